"""Groups of units that can be removed from a model: widths inside its blocks, which nothing outside a block depends on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fusion.pruning.layers import keep_channels, keep_inputs, keep_outputs

Kind = Literal["feed-forward units", "attention heads", "channels"]


class Producer(NamedTuple):
    """A linear layer or convolution whose outputs are the units. copies: how many times they occur in it, one after the other (3 in a
    layer of queries, keys and values)."""

    layer: Any
    copies: int = 1


class Consumer(NamedTuple):
    """A linear layer or convolution whose inputs are the units. norm: batch normalisation of its outputs, if it has no bias."""

    layer: Any
    norm: Any = None


class Count(NamedTuple):
    """An attribute of a module that is `multiple` times the number of units."""

    module: nn.Module
    attribute: str
    multiple: int = 1


@dataclass
class Group:
    """Units inside a block, which are removed by index.

    Args:
        kind: what a unit is.
        producers: layers that make the units; the last copy of the first is what the consumers read, or what it is made of.
        consumers: layers that read the units, the block's output first.
        between: layers in between that treat each channel by itself, in order.
        size: channels of a unit: the width of an attention head, else 1.
        counts: attributes that say how many units there are.
    """

    kind: Kind
    producers: Sequence[Producer]
    consumers: Sequence[Consumer]
    between: Sequence[nn.Module] = ()
    size: int = 1
    counts: Sequence[Count] = field(default=())

    @property
    def units(self) -> int:
        layer, copies = self.producers[0]
        return layer.weight.shape[0] // (copies * self.size)

    def channels(self, units: Tensor) -> Tensor:
        """The channels of these units."""
        return (units[:, None] * self.size + torch.arange(self.size)).flatten()

    def keep(self, units: Tensor) -> None:
        """Removes all units but these (indices, ascending)."""
        total, channels = self.units * self.size, self.channels(units)
        for layer, copies in self.producers:
            keep_outputs(layer, torch.cat([channels + copy * total for copy in range(copies)]))
        for layer in self.between:
            keep_channels(layer, channels)
        for layer, _ in self.consumers:
            keep_inputs(layer, channels)
        for module, attribute, multiple in self.counts:
            setattr(module, attribute, len(units) * multiple)
