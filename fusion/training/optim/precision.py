"""Mixed precision: fp16 autocast with a configurable gradient scaler; bf16 autocast on CPUs that support it."""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from fusion.errors import UserError
from fusion.model import FusionModel, part_of, plain_name


class Fp16(MixedPrecision):
    """Automatic mixed precision in fp16 with `torch.amp.GradScaler`, on a GPU, or on a CPU (slow there: for tests).

    (On a CPU, Lightning's `precision: 16-mixed` silently becomes bf16 without a scaler.)

    Args:
        init_scale: initial loss scale.
        growth_factor: factor of the scale after `growth_interval` updates in a row without an overflow; above 1.
        backoff_factor: factor of the scale after an overflow, whose update is skipped; below 1.
        growth_interval: number of updates in a row without an overflow after which the scale grows.
    """

    def __init__(
        self, init_scale: float = 65536.0, growth_factor: float = 2.0, backoff_factor: float = 0.5, growth_interval: int = 2000
    ) -> None:
        if not (0 < init_scale < math.inf and 1 < growth_factor < math.inf and 0 < backoff_factor < 1 and growth_interval >= 1):
            raise UserError(
                f"Fp16: init_scale {init_scale}, growth_factor {growth_factor}, backoff_factor {backoff_factor}, growth_interval "
                f"{growth_interval}; expected above 0, above 1, between 0 and 1, and at least 1"
            )
        self.make_scaler = partial(
            torch.amp.GradScaler,
            init_scale=init_scale,
            growth_factor=growth_factor,
            backoff_factor=backoff_factor,
            growth_interval=growth_interval,
        )
        super().__init__("16-mixed", "cpu", self.make_scaler("cpu"))  # until the model is on its device

    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        device = next(model.parameters()).device.type  # of the model, not the machine: a run may use the CPU of a machine with GPUs
        if device != self.device:
            self.device, self.scaler = device, self.make_scaler(device)
        return super().connect(model, optimizers, lr_schedulers)


class Bf16OnCpu(Precision):
    """bf16 autocast on a CPU with bf16 instructions (AVX512-BF16 or AMX); on others float32, with a warning. The plan prints which is used.

    Without such instructions bf16 is emulated and slower than float32. With them, matrix products gain most and small convolutions may get
    slower: measure with your own recipe. Weights, gradients and optimiser state stay in float32; there is no gradient scaler.
    """

    def __init__(self) -> None:
        self.precision = "bf16-mixed" if has_bf16() else "32-true"
        if self.precision == "32-true":
            rank_zero_warn("Bf16OnCpu: this processor has no bf16 instructions (AVX512-BF16 or AMX); float32 is used")

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.precision == "bf16-mixed"):
            yield


def has_bf16() -> bool:
    """Whether this CPU has bf16 matrix instructions that torch uses."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def scaler_of(plugin: Precision) -> torch.amp.GradScaler | None:
    """The gradient scaler of a trainer's precision plugin, or None."""
    return plugin.scaler if isinstance(plugin, MixedPrecision) else None


def reject_trained_float16(model: FusionModel, later: Collection[str]) -> None:
    """Raises UserError for float16 weights that are trained, or will be (`later`): small updates vanish, and GradScaler rejects them."""
    for name, p in model.named_parameters():
        if p.dtype == torch.float16 and (p.requires_grad or name in later):
            raise UserError(
                f"model.{part_of(name)}: {plain_name(name)} is float16, in which it can't be trained; "
                f"expected --model.{part_of(name)}.dtype=float32 or bfloat16, or the encoder frozen"
            )
