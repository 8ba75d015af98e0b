"""Which parameters learn how: groups for the optimiser, with rates by part and by layer, and without decay where it does harm."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fusion.encoders.base import Encoder
from fusion.errors import UserError
from fusion.model import FusionModel, check_part, part_of
from fusion.training.optim.schedules import Schedule


@dataclass
class Rate:
    """How fast one part of the model learns.

    Args:
        factor: of the optimiser's learning rate; at least 0.
        layer_decay: of an encoder, the last layer learns at the part's rate and each layer before at this many times the rate of the one
            after it (Howard and Ruder, 2018; Clark et al., 2020); above 0, up to 1.
        schedule: multiplies the run's own. None: the run's own alone.
    """

    factor: float = 1.0
    layer_decay: float = 1.0
    schedule: Schedule | None = None


def check_rates(rates: Mapping[str, Rate], modalities: list[str]) -> None:
    """Raises UserError for a part that the model doesn't have, and for values that mean nothing."""
    for part, rate in rates.items():
        check_part("model.rates", part, modalities)
        if not 0 <= rate.factor < math.inf or not 0 < rate.layer_decay <= 1:
            raise UserError(
                f"model.rates.{part}: factor is {rate.factor}, layer_decay {rate.layer_decay}; expected at least 0, and above 0 up to 1"
            )
        if part == "head" and rate.layer_decay != 1:
            raise UserError("model.rates.head: a head has no layers to decay over; leave layer_decay out")


def parameter_groups(
    model: FusionModel, rates: Mapping[str, Rate] | None = None, later: Mapping[str, int] | None = None
) -> list[dict[str, Any]]:
    """Every parameter that learns, or will `later` (by name, after so many updates), once; those alike in all respects together.

    Weight decay is for the weights of linear maps and convolutions alone: not for norms, biases, gates, embeddings, positions, latents.
    `hidden` tells hidden matrices from output layers and all else, for optimisers that treat them in their own way (Muon); others pay it
    no heed. `rate` is the group's share of the learning rate, `schedule` its own schedule, if it has one.
    """
    rates, later = rates or {}, later or {}
    maps = linear_maps(model)
    outputs = {layer.weight for layer in model.head.output_layers()}
    depth = {part: layer_factors(encoder, rates[part].layer_decay) for part, encoder in model.encoders.items() if part in rates}
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad and name not in later:
            continue
        part = part_of(name)
        rate = rates.get(part, Rate())
        factor = rate.factor * depth.get(part, {}).get(name.removeprefix(f"encoders.{part}."), 1.0)
        hidden, decayed = p in maps and p not in outputs, p in maps
        # Those that begin later stand apart: torch's fused SGD takes no group in which some have momentum and others don't yet.
        kind = (later.get(name, 0), not hidden, not decayed, -factor, id(rate.schedule))
        group = found.setdefault(kind, {"params": [], "hidden": hidden, "rate": factor})
        if not decayed:
            group["weight_decay"] = 0.0
        if rate.schedule is not None:
            group["schedule"] = rate.schedule
        group["params"].append(p)
    return [found[key] for key in sorted(found)]


def linear_maps(model: nn.Module) -> set[Tensor]:
    """The weights by which inputs are multiplied."""
    found = set()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Bilinear | nn.modules.conv._ConvNd):
            found.add(module.weight)
        elif isinstance(module, nn.MultiheadAttention):
            found |= {w for w in (module.in_proj_weight, module.q_proj_weight, module.k_proj_weight, module.v_proj_weight) if w is not None}
    return found


def layer_factors(encoder: nn.Module, decay: float) -> dict[str, float]:
    """By the name of each of the encoder's parameters: 1 in the last layer, `decay` times less in each before."""
    assert isinstance(encoder, Encoder)
    layers = encoder.layers_of_parameters()
    last = max(layers.values(), default=0)
    return {name: decay ** (last - layer) for name, layer in layers.items()}
