"""Learning-rate schedules: pure functions of the number of optimiser updates made."""

import math
from abc import ABC, abstractmethod

from fusion.errors import UserError


class Schedule(ABC):
    """The learning rate as a fraction of its peak, from 0 updates to `horizon` updates.

    warmup: the share of the horizon over which the rate rises linearly from 0, or, from 1 up, a number of updates.
    """

    def __init__(self, warmup: float = 0.0) -> None:
        if not 0 <= warmup < math.inf:
            raise UserError(f"schedule: warmup is {warmup}; expected a share of the training below 1, or a number of updates")
        self.warmup = warmup

    def warmup_updates(self, horizon: int) -> int:
        return round(self.warmup * horizon) if self.warmup < 1 else int(self.warmup)

    def factor(self, update: int, horizon: int) -> float:
        """The fraction for the update that follows `update` finished ones."""
        warmup = self.warmup_updates(horizon)
        if update < warmup:
            return (update + 1) / (warmup + 1)
        return self.after_warmup(min(1.0, (update - warmup) / max(1, horizon - warmup)))

    @abstractmethod
    def after_warmup(self, progress: float) -> float:
        """The fraction at a progress of 0..1 through what follows the warm-up."""


class Constant(Schedule):
    """The peak rate throughout, after the warm-up."""

    def after_warmup(self, progress: float) -> float:
        return 1.0


class Cosine(Schedule):
    """Half a cosine from the peak to a floor (Loshchilov and Hutter, 2017, without restarts).

        floor + (1 - floor) * (1 + cos(pi * progress)) / 2

    floor: a fraction of the peak rate.

    >>> [round(Cosine(floor=0.1).factor(update, horizon=4), 3) for update in range(5)]
    [1.0, 0.868, 0.55, 0.232, 0.1]
    """

    def __init__(self, warmup: float = 0.0, floor: float = 0.0) -> None:
        super().__init__(warmup)
        if not 0 <= floor <= 1:
            raise UserError(f"schedule: floor is {floor}; expected a fraction of the peak rate, 0..1")
        self.floor = floor

    def after_warmup(self, progress: float) -> float:
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2
