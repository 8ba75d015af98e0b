"""Distributed data parallel whose gradients may be compressed on their way between the ranks, and whose bytes are counted."""

from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from fusion.errors import UserError
from fusion.training.precision import scaler_of
from fusion.training.sign_compression import SignCompression

Compression = Literal["none", "fp16", "bf16", "powersgd", "sign"]


class DDP(DDPStrategy):
    """Lightning's DDP (NCCL between GPUs, gloo between processes on CPUs) with the gradients' form on the wire chosen in the recipe.

    (Lightning registers DDP's communication hooks on GPUs alone, in silence; here they work on both.)

    compress: "none"; "fp16" or "bf16" halve the bytes; "powersgd" sends matrices of low rank (Vogels et al., 2019; needs NCCL); "sign"
    sends one bit a value (SignCompression).
    powersgd_rank: the rank of those matrices. powersgd_start: updates sent in full before.
    timeout_s: how long a rank waits for another before the run ends.
    find_unused_parameters: needed where a parameter gets no gradient (model.allow_unused).
    """

    def __init__(
        self,
        compress: Compression = "none",
        powersgd_rank: int = 4,
        powersgd_start: int = 100,
        timeout_s: float = 1800.0,
        find_unused_parameters: bool = False,
    ) -> None:
        if timeout_s <= 0 or powersgd_rank < 1 or powersgd_start < 2:
            raise UserError("DDP: timeout_s must be above 0, powersgd_rank at least 1, powersgd_start at least 2")
        super().__init__(timeout=timedelta(seconds=timeout_s), find_unused_parameters=find_unused_parameters)
        self.compress = compress
        self.powersgd_rank, self.powersgd_start = powersgd_rank, powersgd_start
        self.sign = SignCompression()
        self.powersgd: powerSGD_hook.PowerSGDState | None = None
        self.sent = 0

    def _configure_launcher(self) -> None:
        """Refuse, before any other process is started, what their backend can't do."""
        if self.compress in ("bf16", "powersgd") and self._get_process_group_backend() != "nccl":
            why = "gloo doesn't sum bf16" if self.compress == "bf16" else "its low-rank exchange is unreliable over gloo"
            raise UserError(f"DDP: compress={self.compress} needs NCCL, that is GPUs: {why}. On a CPU take fp16 or sign")
        super()._configure_launcher()

    def _register_ddp_hooks(self) -> None:
        model = self.model
        assert isinstance(model, DistributedDataParallel)
        if self.compress == "none":  # DDP's own way, which is faster than a hook
            return
        if self.compress == "powersgd" and self.powersgd is None:
            self.powersgd = powerSGD_hook.PowerSGDState(
                None, matrix_approximation_rank=self.powersgd_rank, start_powerSGD_iter=self.powersgd_start
            )
        self.sign.embeddings = {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
        model.register_comm_hook(self, exchange)

    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        self.sent = 0
        if self.compress != "sign":
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        scaler = scaler_of(self.precision_plugin)
        self.sign.scale = scaler.get_scale() if scaler is not None else 1.0
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        self.sign.settle(skipped=scaler is not None and scaler.get_scale() < self.sign.scale)
        return result

    def sent_bytes(self) -> int:
        """Bytes that this rank has handed to the exchange of gradients in the last update."""
        return full_bytes(self.lightning_module) if self.compress == "none" else self.sent

    # What exact resuming needs.

    def compression_state(self, parameters: dict[str, Tensor]) -> dict[str, Any]:
        """A collective: all ranks call it."""
        return self.sign.state(parameters, self) if self.compress == "sign" else {}

    def load_compression_state(self, state: dict[str, Any], parameters: dict[str, Tensor]) -> None:
        if state:
            self.sign.load_state(state, parameters, self)


def full_bytes(model: Any) -> int:
    """Of all gradients as they are."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def exchange(strategy: DDP, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's communication hook: the mean over the ranks of a bucket of gradients."""
    buffer = bucket.buffer()
    if strategy.compress == "sign":
        return strategy.sign.exchange(strategy, bucket)
    if strategy.compress == "powersgd":
        assert strategy.powersgd is not None
        before = strategy.powersgd.compression_stats()[2] if strategy.powersgd.iter >= strategy.powersgd_start else None
        future = powerSGD_hook.powerSGD_hook(strategy.powersgd, bucket)
        after = strategy.powersgd.compression_stats()[2]
        strategy.sent += buffer.nbytes if before is None else int((after - before) * buffer.element_size())
        return future
    strategy.sent += buffer.numel() * 2
    hook = default_hooks.fp16_compress_hook if strategy.compress == "fp16" else default_hooks.bf16_compress_hook
    return hook(dist.group.WORLD, bucket)  # type: ignore[arg-type]
