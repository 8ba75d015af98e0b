"""Modality dropout: randomly removes modalities from training samples, keeping at least one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def drop_modalities(inputs: Mapping[str, Any], probability: float) -> dict[str, Tensor]:
    """By modality (B,) bool, which samples retain it: each of a sample's modalities is removed with this probability.

    A sample from which all would be removed retains one of them, chosen uniformly.

    Source: Neverova et al. (2015), "ModDrop: adaptive multi-modal gesture recognition".
    """
    present = torch.stack(list(presence(inputs).values()), dim=1)
    retained = retained_modalities(present, torch.rand(present.shape, device=present.device), probability)
    return dict(zip(inputs, retained.unbind(dim=1), strict=True))


def presence(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """By modality (B,) bool, which samples have it."""
    return {name: x.present for name, x in inputs.items()}


def retained_modalities(present: Tensor, draw: Tensor, probability: float) -> Tensor:
    """(B, M) bool from presence (B, M) and draws (B, M), uniform in 0..1.

    >>> present = torch.tensor([[True, True], [True, True], [False, True]])
    >>> retained_modalities(present, torch.tensor([[0.1, 0.9], [0.1, 0.2], [0.9, 0.0]]), 0.5)
    tensor([[False,  True],
            [False,  True],
            [False,  True]])
    """
    retained = present & (draw >= probability)
    last = torch.where(present, draw, -1.0).argmax(dim=1, keepdim=True)
    only = torch.zeros_like(retained).scatter(1, last, True) & present
    return torch.where(retained.any(dim=1, keepdim=True), retained, only)
