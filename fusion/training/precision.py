"""fp16 autocast with a gradient scaler whose every setting is a value of the recipe."""

from collections.abc import Collection

import torch
from lightning.pytorch.plugins import MixedPrecision, Precision

from fusion.errors import UserError
from fusion.model import FusionModel, part_of, plain_name


class Fp16(MixedPrecision):
    """Automatic mixed precision in fp16 with `torch.amp.GradScaler`, on a GPU, or on a CPU (slow there: for tests).

    (Lightning's `precision: 16-mixed` becomes bf16 without a scaler on a CPU, in silence.)

    init_scale: what the loss is multiplied by at first. backoff_factor: what the scale is multiplied by after an overflow, whose update is
    skipped. growth_factor: the same after `growth_interval` updates in a row without one.
    """

    def __init__(
        self, init_scale: float = 65536.0, growth_factor: float = 2.0, backoff_factor: float = 0.5, growth_interval: int = 2000
    ) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        scaler = torch.amp.GradScaler(
            device, init_scale=init_scale, growth_factor=growth_factor, backoff_factor=backoff_factor, growth_interval=growth_interval
        )
        super().__init__("16-mixed", device, scaler)


def scaler_of(plugin: Precision) -> torch.amp.GradScaler | None:
    """The gradient scaler of a trainer's precision, None where it has none."""
    return plugin.scaler if isinstance(plugin, MixedPrecision) else None


def reject_trained_float16(model: FusionModel, later: Collection[str]) -> None:
    """Raises UserError where float16 weights learn, or will (`later`): updates below their resolution vanish, and no scaler takes them."""
    for name, p in model.named_parameters():
        if p.dtype == torch.float16 and (p.requires_grad or name in later):
            raise UserError(
                f"model.{part_of(name)}: {plain_name(name)} is float16, in which it can't be trained; "
                f"expected --model.{part_of(name)}.dtype=float32 or bfloat16, or the encoder frozen"
            )
