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
        warmup: fraction of the horizon (all updates of the training) over which the rate rises linearly from 0; values of 1 and more are a
            number of updates.
        floor: lowest rate after the warm-up, as a fraction of the peak rate, from 0 to 1.
    """

    def __init__(self, warmup: float = 0.0, floor: float = 0.0) -> None:
        if not 0 <= warmup < math.inf:
            raise UserError(f"schedule: warmup is {warmup}; expected a fraction of the training below 1, or a number of updates")
        fraction("floor", floor)
        self.warmup, self.floor = warmup, floor

    def warmup_updates(self, horizon: int) -> int:
        return round(self.warmup * horizon) if self.warmup < 1 else int(self.warmup)

    def factor(self, update: int, horizon: int) -> float:
        """Fraction of the peak rate for the update that follows `update` finished ones."""
        warmup = self.warmup_updates(horizon)
        if update < warmup:
            return (update + 1) / (warmup + 1)
        progress = min(1.0, (update - warmup) / max(1, horizon - warmup))
        return self.floor + (1 - self.floor) * self.shape(progress)

    @abstractmethod
    def shape(self, progress: float) -> float:
        """Decay curve after the warm-up: a value in 0..1 at a progress of 0..1."""


class Constant(Schedule):
    """Constant peak rate after the warm-up."""

    def __init__(self, warmup: float = 0.0) -> None:
        super().__init__(warmup)

    def shape(self, progress: float) -> float:
        return 1.0


class Polynomial(Schedule):
    """Polynomial decay (Chen et al., 2017, DeepLab): (1 - progress) ** power.

    Args:
        power: exponent, above 0: 1 is linear; above 1 the rate falls fastest at first.

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
    """Linear decay from the peak to the floor.

    >>> [Linear(floor=0.5).factor(update, horizon=4) for update in range(5)]
    [1.0, 0.875, 0.75, 0.625, 0.5]
    """

    def __init__(self, warmup: float = 0.0, floor: float = 0.0) -> None:
        super().__init__(1.0, warmup, floor)


class Step(Schedule):
    """Step decay: the rate is multiplied by a factor at given points.

    Args:
        at: points at which the rate falls, as fractions of the training after the warm-up, from 0 to 1.
        gamma: factor of the rate at each point, from 0 to 1.

    >>> [round(Step(at=[0.5, 0.75], gamma=0.1).factor(update, horizon=4), 4) for update in range(5)]
    [1.0, 1.0, 0.1, 0.01, 0.01]
    """

    def __init__(self, at: Sequence[float] = (0.5, 0.75), gamma: float = 0.1, warmup: float = 0.0, floor: float = 0.0) -> None:
        super().__init__(warmup, floor)
        for point in at:
            fraction("at", point)
        self.at, self.gamma = list(at), fraction("gamma", gamma)

    def shape(self, progress: float) -> float:
        return self.gamma ** sum(progress >= point for point in self.at)


class Exponential(Schedule):
    """Exponential decay, by the same factor at every update: end ** progress.

    Args:
        end: fraction of the peak rate (of the part above the floor) reached at the end of the training; above 0, up to 1.

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
    """Cosine decay from the peak to the floor (Loshchilov and Hutter, 2017, without restarts): (1 + cos(pi * progress)) / 2.

    >>> [round(Cosine(floor=0.1).factor(update, horizon=4), 3) for update in range(5)]
    [1.0, 0.868, 0.55, 0.232, 0.1]
    """

    def shape(self, progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2


class CosineRestarts(Schedule):
    """Cosine decay with warm restarts at the peak rate (Loshchilov and Hutter, 2017).

    The first cycle takes 1 / (1 + growth + growth^2 + ...) of the training after the warm-up, so that the last one ends with the training.

    Args:
        cycles: number of cycles.
        growth: length of each cycle relative to the one before; above 0.

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
        # With a tolerance, so that rounding doesn't count the first update of a cycle as the last one of the cycle before.
        cycle = max(i for i, start in enumerate(self.starts[:-1]) if start <= progress + 1e-9)
        begin, end = self.starts[cycle : cycle + 2]
        return (1 + math.cos(math.pi * max(0.0, progress - begin) / (end - begin))) / 2


class WarmupStableDecay(Schedule):
    """Constant peak rate, then a decay to the floor at the end.

    Args:
        decay: final fraction of the training after the warm-up over which the rate falls; above 0, up to 1.
        root: decay as 1 - sqrt (Hägele et al., 2024) instead of linearly.

    >>> [round(WarmupStableDecay(decay=0.5).factor(update, horizon=4), 3) for update in range(5)]
    [1.0, 1.0, 1.0, 0.5, 0.0]
    """

    def __init__(self, decay: float = 0.2, warmup: float = 0.05, floor: float = 0.0, root: bool = False) -> None:
        super().__init__(warmup, floor)
        if not 0 < decay <= 1:
            raise UserError(f"schedule: decay is {decay}; expected a fraction of the training, above 0 and up to 1")
        self.decay, self.root = decay, root

    def shape(self, progress: float) -> float:
        down = max(0.0, (progress - (1 - self.decay)) / self.decay)
        return 1 - math.sqrt(down) if self.root else 1 - down


def fraction(name: str, value: float) -> float:
    """The value itself; raises UserError if it is outside 0..1."""
    if not 0 <= value <= 1:
        raise UserError(f"schedule: {name} is {value}; expected a fraction, 0..1")
    return value
