"""Learning-rate schedules: pure functions of the number of optimiser updates made."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

from fusion.errors import UserError


class Schedule(ABC):
    """The learning rate as a fraction of its peak, from 0 updates to `horizon` updates.

        update < warmup:  (update + 1) / (warmup + 1)
        else:             floor + (1 - floor) * shape(progress),   progress = (update - warmup) / (horizon - warmup), at most 1

    Args:
        warmup: the share of the horizon (all updates of the training) over which the rate rises linearly from 0, or, from 1 up, a number of
            updates.
        floor: the fraction of the peak rate below which it never falls after the warm-up, from 0 to 1.
    """

    def __init__(self, warmup: float = 0.0, floor: float = 0.0) -> None:
        if not 0 <= warmup < math.inf:
            raise UserError(f"schedule: warmup is {warmup}; expected a share of the training below 1, or a number of updates")
        fraction("floor", floor)
        self.warmup, self.floor = warmup, floor

    def warmup_updates(self, horizon: int) -> int:
        return round(self.warmup * horizon) if self.warmup < 1 else int(self.warmup)

    def factor(self, update: int, horizon: int) -> float:
        """The fraction for the update that follows `update` finished ones."""
        warmup = self.warmup_updates(horizon)
        if update < warmup:
            return (update + 1) / (warmup + 1)
        progress = min(1.0, (update - warmup) / max(1, horizon - warmup))
        return self.floor + (1 - self.floor) * self.shape(progress)

    @abstractmethod
    def shape(self, progress: float) -> float:
        """0..1 at a progress of 0..1 through what follows the warm-up."""


class Constant(Schedule):
    """The peak rate throughout, after the warm-up."""

    def __init__(self, warmup: float = 0.0) -> None:
        super().__init__(warmup)

    def shape(self, progress: float) -> float:
        return 1.0


class Polynomial(Schedule):
    """A power of what is left to go (Chen et al., 2017, DeepLab): (1 - progress) ** power.

    Args:
        power: exponent, above 0: 1 is a straight line, with more the rate falls fastest at first.

    >>> [Polynomial(power=2.0).factor(update, horizon=4) for update in range(5)]
    [1.0, 0.5625, 0.25, 0.0625, 0.0]
    """

    def __init__(self, power: float = 2.0, warmup: float = 0.0, floor: float = 0.0) -> None:
        super().__init__(warmup, floor)
        if not 0 < power < math.inf:
            raise UserError(f"schedule: power is {power}; expected a number above 0")
        self.power = power

    def shape(self, progress: float) -> float:
        return (1 - progress) ** self.power


class Linear(Polynomial):
    """A straight line from the peak to the floor.

    >>> [Linear(floor=0.5).factor(update, horizon=4) for update in range(5)]
    [1.0, 0.875, 0.75, 0.625, 0.5]
    """

    def __init__(self, warmup: float = 0.0, floor: float = 0.0) -> None:
        super().__init__(1.0, warmup, floor)


class Step(Schedule):
    """The rate falls in steps.

    Args:
        at: shares of what follows the warm-up, from 0 to 1, at each of which the rate falls.
        gamma: the factor of each fall, from 0 to 1.

    >>> [round(Step(at=[0.5, 0.75], gamma=0.1).factor(update, horizon=4), 4) for update in range(5)]
    [1.0, 1.0, 0.1, 0.01, 0.01]
    """

    def __init__(self, at: Sequence[float] = (0.5, 0.75), gamma: float = 0.1, warmup: float = 0.0, floor: float = 0.0) -> None:
        super().__init__(warmup, floor)
        for share in at:
            fraction("at", share)
        self.at, self.gamma = list(at), fraction("gamma", gamma)

    def shape(self, progress: float) -> float:
        return self.gamma ** sum(progress >= share for share in self.at)


class Exponential(Schedule):
    """The same factor at every update: end ** progress.

    Args:
        end: the fraction of the peak rate (of what lies above the floor) that is reached at the end of the training; above 0, up to 1.

    >>> [round(Exponential(end=0.0625).factor(update, horizon=4), 4) for update in range(5)]
    [1.0, 0.5, 0.25, 0.125, 0.0625]
    """

    def __init__(self, end: float = 0.01, warmup: float = 0.0, floor: float = 0.0) -> None:
        super().__init__(warmup, floor)
        if not 0 < end <= 1:
            raise UserError(f"schedule: end is {end}; expected a fraction of the peak rate, above 0 and up to 1")
        self.end = end

    def shape(self, progress: float) -> float:
        return self.end**progress


class Cosine(Schedule):
    """Half a cosine from the peak to the floor (Loshchilov and Hutter, 2017, without restarts): (1 + cos(pi * progress)) / 2.

    >>> [round(Cosine(floor=0.1).factor(update, horizon=4), 3) for update in range(5)]
    [1.0, 0.868, 0.55, 0.232, 0.1]
    """

    def shape(self, progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2


class CosineRestarts(Schedule):
    """Cosines that start again at the peak (Loshchilov and Hutter, 2017).

    The first is 1 / (1 + growth + growth^2 + ...) of what follows the warm-up, so that the last ends with the training.

    Args:
        cycles: number of cosines.
        growth: how many times as long each is as the one before; above 0.

    >>> [round(CosineRestarts(cycles=2).factor(update, horizon=4), 3) for update in range(5)]
    [1.0, 0.5, 1.0, 0.5, 0.0]
    """

    def __init__(self, cycles: int = 3, growth: float = 1.0, warmup: float = 0.0, floor: float = 0.0) -> None:
        super().__init__(warmup, floor)
        if cycles < 1:
            raise UserError(f"schedule: cycles is {cycles}; expected at least 1")
        if not 0 < growth < math.inf:
            raise UserError(f"schedule: growth is {growth}; expected a number above 0")
        lengths = [growth**cycle for cycle in range(cycles)]
        self.starts = [sum(lengths[:cycle]) / sum(lengths) for cycle in range(cycles)] + [1.0]

    def shape(self, progress: float) -> float:
        # Rounding must not take the first update of a cycle for the last of the one before.
        cycle = max(i for i, start in enumerate(self.starts[:-1]) if start <= progress + 1e-9)
        begin, end = self.starts[cycle : cycle + 2]
        return (1 + math.cos(math.pi * max(0.0, progress - begin) / (end - begin))) / 2


class WarmupStableDecay(Schedule):
    """The peak, then a decay to the floor at the end.

    Args:
        decay: the last share of what follows the warm-up, over which the rate falls; above 0, up to 1.
        root: fall as 1 - sqrt (Hägele et al., 2024) instead of in a line.

    >>> [round(WarmupStableDecay(decay=0.5).factor(update, horizon=4), 3) for update in range(5)]
    [1.0, 1.0, 1.0, 0.5, 0.0]
    """

    def __init__(self, decay: float = 0.2, warmup: float = 0.05, floor: float = 0.0, root: bool = False) -> None:
        super().__init__(warmup, floor)
        if not 0 < decay <= 1:
            raise UserError(f"schedule: decay is {decay}; expected a share of the training, above 0 and up to 1")
        self.decay, self.root = decay, root

    def shape(self, progress: float) -> float:
        down = max(0.0, (progress - (1 - self.decay)) / self.decay)
        return 1 - math.sqrt(down) if self.root else 1 - down


def fraction(name: str, value: float) -> float:
    """The value, refused if it is none."""
    if not 0 <= value <= 1:
        raise UserError(f"schedule: {name} is {value}; expected a fraction, 0..1")
    return value
