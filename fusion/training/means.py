"""Means over what a training saw: of an update, and of an epoch so far."""

from collections.abc import Mapping
from typing import Protocol

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from fusion.training.distributed.collectives import summed


class OnDevice(Protocol):
    """Whose means they are."""

    trainer: Trainer

    @property
    def device(self) -> torch.device: ...


class Means:
    """Figures of training batches (the loss, a share of hits), summed without waiting for the device.

    sums: of the epoch, on this rank, with the number of "samples"; what a resumed run had seen before is rank 0's.
    """

    def __init__(self) -> None:
        self.noted: list[dict[str, Tensor]] = []  # by accumulated batch of the update at hand
        self.sums: dict[str, Tensor | float] = {"samples": 0}

    def clear(self) -> None:
        """A new epoch begins."""
        self.sums = {"samples": 0}

    def note(self, figures: Mapping[str, Tensor], samples: int, *, begins_update: bool) -> None:
        """Take in the means over a training batch of so many samples."""
        if begins_update:
            self.noted = []
        self.noted.append({name: value.detach().float() for name, value in figures.items()})
        self.sums["samples"] += samples
        for name, value in self.noted[-1].items():
            self.sums[name] = self.sums.get(name, 0) + value.to(exact(value.device)) * samples

    def of_update(self, engine: OnDevice) -> dict[str, Tensor]:
        """What the update at hand gave, over all ranks. A collective: all ranks call it."""
        own = torch.stack([torch.stack([figures[name] for figures in self.noted]).mean() for name in self.noted[0]])
        return dict(zip(self.noted[0], summed(own, engine.trainer.world_size) / engine.trainer.world_size, strict=True))

    def epoch_sums(self, engine: OnDevice) -> dict[str, float]:
        """What the epoch gave so far, over all ranks. A collective: all ranks call it."""
        if len(self.sums) == 1:
            return {"samples": 0}
        own = [torch.as_tensor(value, dtype=exact(engine.device), device=engine.device) for value in self.sums.values()]
        return dict(zip(self.sums, summed(torch.stack(own), engine.trainer.world_size).tolist(), strict=True))

    def of_epoch(self, engine: OnDevice) -> dict[str, float]:
        """Of the epoch so far, over all ranks and what a run that was resumed had seen before; in single precision, in which it is the same
        whatever the order of the summands was. A collective.
        """
        sums = self.epoch_sums(engine)
        samples = sums.pop("samples")
        return {name: torch.tensor(total / samples, dtype=torch.float32).item() for name, total in sums.items()}


def exact(device: torch.device) -> torch.dtype:
    """What to sum in."""
    return torch.float32 if device.type == "mps" else torch.float64  # which Apple's GPUs lack
