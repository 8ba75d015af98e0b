"""Distributed data parallel with optional gradient compression, and a count of the bytes sent."""

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
    """Lightning's DDP (NCCL between GPUs, gloo between processes on CPUs), with a choice of gradient compression.

    (Lightning silently ignores DDP's communication hooks on CPUs; here they work on GPUs and CPUs.)

    (torch's PowerSGD is not supported: an overflow leaves NaN in its error memory permanently, and that memory belongs to DDP's buckets, so
    that it can neither be saved in checkpoints nor survive the unfreezing of parameters.)

    Args:
        compress: compression of the exchanged gradients: "none"; "fp16" or "bf16" (GPUs only) halve the bytes; "sign" sends one bit a value
            (SignCompression).
        timeout_s: how long a rank waits for another before the run ends, in seconds; above 0.
        find_unused_parameters: required where a parameter gets no gradient (model.allow_unused).
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
        # Gradients are views of the exchanged buckets, which saves their memory once and avoids copies.
        super().__init__(timeout=timeout, find_unused_parameters=find_unused_parameters, gradient_as_bucket_view=True)
        self.compress = compress
        self.sign = SignCompression()
        self.resumed: dict[str, Any] = {}  # compression state of the checkpoint, until the model is on its device
        self.sent = 0

    def before_launch(self) -> None:
        """Reject options that the backend doesn't support, before the other processes are started."""
        if self.compress == "bf16" and self.backend != "nccl":
            raise UserError("DDP: compress=bf16 needs NCCL, that is GPUs: gloo can't sum bf16. On CPUs use fp16 or sign")
        if syncs_batchnorm(self) and self.root_device.type == "cpu":
            raise UserError("trainer.sync_batchnorm needs GPUs: torch has no synchronised batch normalisation on CPUs")

    def setup(self, trainer: Trainer) -> None:
        if syncs_batchnorm(self):
            self.sync_batchnorm_by(SyncStatistics())
        super().setup(trainer)

    def register_hooks(self) -> None:
        model = self.model
        assert isinstance(model, DistributedDataParallel)
        if self.compress == "none":  # DDP's built-in reduction is faster than a hook
            return
        if self.resumed:
            module = self.lightning_module
            assert module is not None
            checkpoints = Path(str(module.trainer.ckpt_path)).parent
            updates, world = self.resumed["updates"], self.resumed["world"]
            own = residuals.read(checkpoints, updates, world, self.global_rank, self.world_size)
            self.sign.load_state(self.resumed, own, dict(module.named_parameters()))
            self.resumed = {}
        self.sign.embeddings = {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
        model.register_comm_hook(self, exchange)

    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        self.sent = 0
        if self.compress != "sign":
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        scaler, engine = scaler_of(self.precision_plugin), self.lightning_module
        self.sign.scale = 1.0 if scaler is None else scaler.scale(torch.ones((), device=self.root_device))
        before = engine.updates  # type: ignore[union-attr]
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        self.sign.end_update(skipped=scaler is not None and engine.updates == before)  # type: ignore[union-attr]
        return result

    def sent_bytes(self) -> int:
        """Bytes of gradients that this rank sent in the last update."""
        return full_bytes(self.lightning_module) if self.compress == "none" else self.sent

    # Checkpoint state: what is the same on all ranks in the checkpoint itself, each rank's residuals in files beside it

    def compression_state(self) -> dict[str, Any]:
        if self.compress != "sign" or not self.sign.residual:
            return {}
        return self.sign.state(dict(self.lightning_module.named_parameters())) | {"world": self.world_size}  # type: ignore[union-attr]

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        folder, state = Path(filepath).parent, checkpoint["fusion"]["compression"]
        if state:
            own = residuals.path_of(folder, state["updates"], self.global_rank, self.world_size)
            residuals.write(own, self.sign.residual_state(dict(self.lightning_module.named_parameters())))  # type: ignore[union-attr]
            self.barrier("residuals")  # write the checkpoint only once all residuals exist
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if state and self.is_global_zero:
            residuals.clean(folder)

    def load_compression_state(self, state: dict[str, Any]) -> None:
        """Store the state until the model is on its device, where `register_hooks` loads it."""
        self.resumed = state if self.compress == "sign" else {}
        if self.resumed and "world" not in state:
            raise UserError("the checkpoint's sign compression was written by an older version of fusion; --init_from takes its weights")


def full_bytes(model: Any) -> int:
    """Bytes of all gradients without compression."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def exchange(strategy: DDP, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's communication hook: averages a bucket of gradients over the ranks."""
    buffer = bucket.buffer()
    if strategy.compress == "sign":
        return strategy.sign.exchange(strategy, bucket)
    strategy.sent += buffer.numel() * 2
    hook = default_hooks.fp16_compress_hook if strategy.compress == "fp16" else default_hooks.bf16_compress_hook
    return hook(dist.group.WORLD, bucket)  # type: ignore[arg-type]
