"""Means of training figures (loss, batch metrics) over an update and over an epoch."""

from collections.abc import Mapping
from typing import Protocol

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from fusion.training.distributed.collectives import summed


class OnDevice(Protocol):
    """What `Means` needs of the engine: its trainer and its device."""

    trainer: Trainer

    @property
    def device(self) -> torch.device: ...


class Means:
    """Figures of training batches (the loss, the accuracy), summed without synchronising with the device.

    sums: of the epoch, on this rank, with the number of "samples"; the sums of a resumed run's checkpoint are on rank 0.
    """

    def __init__(self) -> None:
        self.update_figures: list[dict[str, Tensor]] = []  # one for each accumulated batch of the current update
        self.sums: dict[str, Tensor | float] = {"samples": 0}

    def clear(self) -> None:
        """Reset the sums, at the start of an epoch."""
        self.sums = {"samples": 0}

    def note(self, figures: Mapping[str, Tensor], samples: int, *, begins_update: bool) -> None:
        """Add the means over a training batch of so many samples."""
        if begins_update:
            self.update_figures = []
        self.update_figures.append({name: value.detach().float() for name, value in figures.items()})
        self.sums["samples"] += samples
        for name, value in self.update_figures[-1].items():
            self.sums[name] = self.sums.get(name, 0) + value.to(sum_dtype(value.device)) * samples

    def of_update(self, engine: OnDevice) -> dict[str, Tensor]:
        """Means of the current update over all ranks. A collective: all ranks call it."""
        names = list(self.update_figures[0])
        own = torch.stack([torch.stack([figures[name] for figures in self.update_figures]).mean() for name in names])
        return dict(zip(names, summed(own, engine.trainer.world_size) / engine.trainer.world_size, strict=True))

    def epoch_sums(self, engine: OnDevice) -> dict[str, float]:
        """Sums of the epoch so far, over all ranks. A collective: all ranks call it."""
        if len(self.sums) == 1:
            return {"samples": 0}
        own = [torch.as_tensor(value, dtype=sum_dtype(engine.device), device=engine.device) for value in self.sums.values()]
        return dict(zip(self.sums, summed(torch.stack(own), engine.trainer.world_size).tolist(), strict=True))

    def of_epoch(self, engine: OnDevice) -> dict[str, float]:
        """Means of the epoch so far, over all ranks and including the part before a resumed run's checkpoint. Rounded to single precision,
        so that they don't depend on the order of summation. A collective.
        """
        sums = self.epoch_sums(engine)
        samples = sums.pop("samples")
        return {name: torch.tensor(total / samples, dtype=torch.float32).item() for name, total in sums.items()}


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which sums are accumulated."""
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
