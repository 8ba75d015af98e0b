"""Weights that are zero, and stay zero."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fusion.errors import UserError


class KeptZeros:
    """Sets weights that were zero when training began to zero again after each update, whatever the optimiser, precision or accumulation.

    Which weights is part of the checkpoint: one that is zero by chance when a run is interrupted isn't kept at zero by the resumed run.
    """

    def __init__(self) -> None:
        self.loaded: Mapping[str, Tensor] = {}
        self.held: list[tuple[str, Tensor, Tensor]] = []  # name, weight, mask of zeros

    def begin(self, model: nn.Module) -> None:
        """Find the zeros of a model, unless they were loaded. Raises UserError if there are none."""
        self.held = []
        for name, weight in matrices(model).items():
            zero = unpacked(self.loaded[name], weight) if name in self.loaded else weight.detach() == 0
            if (name in self.loaded or not self.loaded) and bool(zero.any()):
                self.held.append((name, weight, zero))
        if not self.held:
            raise UserError("model.keep_zeros: no weight is zero; start from a sparse model: --init_from=RUN")

    @torch.no_grad()
    def apply(self, *_: Any) -> None:
        """Set the weights to zero; a hook after the optimiser's step."""
        for _name, weight, zero in self.held:
            weight.masked_fill_(zero, 0.0)

    def state(self) -> dict[str, Tensor]:
        """The masks, by the names of the weights, one bit for each weight."""
        return {name: packed(zero) for name, _, zero in self.held} or dict(self.loaded)

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.loaded = state


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """The weights of linear layers and convolutions, by name."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    return {f"{name}.weight": layer.weight for name, layer in layers.items()}


BITS = 2 ** torch.arange(8, dtype=torch.uint8)


def packed(mask: Tensor) -> Tensor:
    """A mask as bytes of 8 bits each.

    >>> packed(torch.tensor([True, False, True])).tolist()
    [5]
    """
    flat = mask.flatten().cpu()
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).view(-1, 8)
    return (padded * BITS).sum(dim=1, dtype=torch.uint8)


def unpacked(state: Tensor, like: Tensor) -> Tensor:
    """The mask of a tensor's shape from its bytes."""
    bits = (state.to(like.device)[:, None] & BITS.to(like.device)) != 0
    return bits.flatten()[: like.numel()].view(like.shape)
