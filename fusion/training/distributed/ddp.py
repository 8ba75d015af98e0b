"""Distributed data parallel whose gradients may be compressed on their way between the ranks, and whose bytes are counted."""

from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from fusion.errors import UserError
from fusion.lightning_private import HookedDDP, syncs_batchnorm
from fusion.training.distributed import residuals
from fusion.training.distributed.batch_statistics import SyncStatistics
from fusion.training.distributed.lost_ranks import LeavesLostRanks
from fusion.training.distributed.sign_compression import SignCompression
from fusion.training.optim.precision import scaler_of

Compression = Literal["none", "fp16", "bf16", "sign"]


class DDP(LeavesLostRanks, HookedDDP):
    """Lightning's DDP (NCCL between GPUs, gloo between processes on CPUs) with the gradients' form on the wire chosen in the recipe.

    (Lightning registers DDP's communication hooks on GPUs alone, in silence; here they work on both.)

    (PowerSGD, which torch has, is not among the compressions: one overflow leaves NaN in its error memory for good, which is kept by DDP's
    buckets and fits neither a thaw nor a checkpoint.)

    Args:
        compress: how gradients are exchanged: "none" in full; "fp16" or "bf16" (GPUs only) halve the bytes; "sign" sends one bit a value
            (SignCompression).
        timeout_s: how long a rank waits for another before the run ends, in seconds; above 0.
        find_unused_parameters: needed where a parameter gets no gradient (model.allow_unused).
    """

    def __init__(
        self,
        compress: Compression = "none",
        timeout_s: float = 1800.0,
        find_unused_parameters: bool = False,
    ) -> None:
        if timeout_s <= 0:
            raise UserError(f"DDP: timeout_s is {timeout_s}; expected a number above 0")
        timeout = timedelta(seconds=timeout_s)
        # Gradients are views of what is exchanged: half the memory for them, and no copies.
        super().__init__(timeout=timeout, find_unused_parameters=find_unused_parameters, gradient_as_bucket_view=True)
        self.compress = compress
        self.sign = SignCompression()
        self.resumed: dict[str, Any] = {}  # the state of a checkpoint, until the model is on its device
        self.sent = 0

    def before_launch(self) -> None:
        """Refuse, before any other process is started, what their backend can't do."""
        if self.compress == "bf16" and self.backend != "nccl":
            raise UserError("DDP: compress=bf16 needs NCCL, that is GPUs: gloo doesn't sum bf16. On a CPU take fp16 or sign")
        if syncs_batchnorm(self) and self.root_device.type == "cpu":
            raise UserError("trainer.sync_batchnorm needs GPUs: torch has no synchronised batch normalisation on CPUs")

    def setup(self, trainer: Trainer) -> None:
        if syncs_batchnorm(self):
            self.sync_batchnorm_by(SyncStatistics())
        super().setup(trainer)

    def register_hooks(self) -> None:
        model = self.model
        assert isinstance(model, DistributedDataParallel)
        if self.compress == "none":  # DDP's own way, which is faster than a hook
            return
        if self.resumed:
            module = self.lightning_module
            assert module is not None
            checkpoints = Path(str(module.trainer.ckpt_path)).parent
            updates, world = self.resumed["updates"], self.resumed["world"]
            unsaid = residuals.read(checkpoints, updates, world, self.global_rank, self.world_size)
            self.sign.load_state(self.resumed, unsaid, dict(module.named_parameters()))
            self.resumed = {}
        self.sign.embeddings = {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
        model.register_comm_hook(self, exchange)

    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        self.sent = 0
        if self.compress != "sign":
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        scaler, task = scaler_of(self.precision_plugin), self.lightning_module
        self.sign.scale = 1.0 if scaler is None else scaler.scale(torch.ones((), device=self.root_device))
        before = task.updates  # type: ignore[union-attr]
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        self.sign.settle(skipped=scaler is not None and task.updates == before)  # type: ignore[union-attr]
        return result

    def sent_bytes(self) -> int:
        """Bytes that this rank has handed to the exchange of gradients in the last update."""
        return full_bytes(self.lightning_module) if self.compress == "none" else self.sent

    # What exact resuming needs: in the checkpoint what is the same on all ranks, beside it what isn't.

    def compression_state(self) -> dict[str, Any]:
        if self.compress != "sign" or not self.sign.residual:
            return {}
        return self.sign.state(dict(self.lightning_module.named_parameters())) | {"world": self.world_size}  # type: ignore[union-attr]

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        folder, state = Path(filepath).parent, checkpoint["fusion"]["compression"]
        if state:
            own = residuals.path_of(folder, state["updates"], self.global_rank, self.world_size)
            residuals.write(own, self.sign.unsaid(dict(self.lightning_module.named_parameters())))  # type: ignore[union-attr]
            self.barrier("residuals")  # a checkpoint is there when all that it names is
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if state and self.is_global_zero:
            residuals.clean(folder)

    def load_compression_state(self, state: dict[str, Any]) -> None:
        """To be taken once the model is on its device."""
        self.resumed = state if self.compress == "sign" else {}
        if self.resumed and "world" not in state:
            raise UserError("the checkpoint's sign compression is of an older version of fusion; --init_from takes its weights")


def full_bytes(model: Any) -> int:
    """Of all gradients as they are."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def exchange(strategy: DDP, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's communication hook: the mean over the ranks of a bucket of gradients."""
    buffer = bucket.buffer()
    if strategy.compress == "sign":
        return strategy.sign.exchange(strategy, bucket)
    strategy.sent += buffer.numel() * 2
    hook = default_hooks.fp16_compress_hook if strategy.compress == "fp16" else default_hooks.bf16_compress_hook
    return hook(dist.group.WORLD, bucket)  # type: ignore[arg-type]
