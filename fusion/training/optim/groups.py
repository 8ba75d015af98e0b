"""Parameter groups for the optimiser: learning rates by part and by layer, no weight decay for norms, biases and embeddings."""

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
    """Learning rate of one part of the model, relative to the optimiser's.

    Args:
        factor: multiplies the optimiser's learning rate; at least 0.
        layer_decay: layer-wise decay of an encoder: its last layer learns at the part's rate, and each earlier layer at this many times the
            rate of the next one (Howard and Ruder, 2018; Clark et al., 2020); above 0, up to 1.
        schedule: multiplies the run's schedule. None: the run's schedule alone.
    """

    factor: float = 1.0
    layer_decay: float = 1.0
    schedule: Schedule | None = None


def check_rates(rates: Mapping[str, Rate], modalities: list[str]) -> None:
    """Raises UserError for a part that the model doesn't have, and for values out of range."""
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
    """Groups of all trainable parameters, each in exactly one; with those trainable `later` (by name, the update after which they are).

    Only the weights of linear layers and convolutions have weight decay: not norms, biases, gates, embeddings, positions or latents.
    `hidden` marks hidden matrices (not output layers, vectors, embeddings) for optimisers that treat them differently (Muon); other
    optimisers ignore it. `rate` multiplies the group's learning rate; `schedule` is the group's own schedule, if any.
    """
    rates, later = rates or {}, later or {}
    maps = linear_maps(model)
    outputs = {layer.weight for layer in model.head.output_layers()}
    depth = {part: layer_factors(encoder, rates[part].layer_decay) for part, encoder in model.encoders.items() if part in rates}
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad and name not in later:
            continue
        part = part_of(name)
        rate = rates.get(part, Rate())
        factor = rate.factor * depth.get(part, {}).get(name.removeprefix(f"encoders.{part}."), 1.0)
        hidden, decayed = p in maps and p not in outputs, p in maps
        # Parameters unfrozen later get their own groups: torch's fused SGD needs a momentum buffer for all parameters of a group or none.
        kind = (later.get(name, 0), not hidden, not decayed, -factor, id(rate.schedule))
        group = groups.setdefault(kind, {"params": [], "hidden": hidden, "rate": factor})
        if not decayed:
            group["weight_decay"] = 0.0
        if rate.schedule is not None:
            group["schedule"] = rate.schedule
        group["params"].append(p)
    return [groups[key] for key in sorted(groups)]


def linear_maps(model: nn.Module) -> set[Tensor]:
    """Weights of linear layers, convolutions and attention projections."""
    weights = set()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Bilinear | nn.modules.conv._ConvNd):
            weights.add(module.weight)
        elif isinstance(module, nn.MultiheadAttention):
            projections = (module.in_proj_weight, module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
            weights |= {w for w in projections if w is not None}
    return weights


def layer_factors(encoder: nn.Module, decay: float) -> dict[str, float]:
    """Learning-rate factor by name of the encoder's parameters: 1 in the last layer, multiplied by `decay` for each layer before."""
    assert isinstance(encoder, Encoder)
    layers = encoder.layers_of_parameters()
    last = max(layers.values(), default=0)
    return {name: decay ** (last - layer) for name, layer in layers.items()}
