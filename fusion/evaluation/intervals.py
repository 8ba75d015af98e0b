"""Confidence intervals: of a mean over a few seeds, and of a share of samples."""

import math
from collections.abc import Sequence

import numpy as np

LEVEL = 0.95
STEPS = 20_000


def t_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float, float]:
    """The mean of the values, and the limits of its confidence interval by Student's t, which allows for the deviation being estimated
    from few values; infinite for a single one.

    Args:
        values: of independent runs, such as the differences of a score by seed.
        level: probability that the interval covers, between 0 and 1.

    >>> tuple(round(x, 3) for x in t_interval([1.0, 2.0, 3.0]))
    (2.0, -0.484, 4.484)
    """
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return mean, -math.inf, math.inf
    half = t_quantile((1 + level) / 2, count - 1) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return mean, mean - half, mean + half


def t_quantile(probability: float, degrees: int) -> float:
    """The quantile above 1/2 of Student's t distribution, by integration of its density in the angle atan(t / sqrt(degrees))."""
    angles = np.linspace(0, math.pi / 2, STEPS + 1)
    density = np.cos(angles) ** (degrees - 1)
    steps = (density[1:] + density[:-1]) / 2
    reached = np.concatenate([[0.0], steps.cumsum()]) / steps.sum() / 2 + 0.5
    return math.sqrt(degrees) * math.tan(float(np.interp(probability, reached, angles)))


def wilson_interval(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval (1927) of a share of `count` samples, by default of 95 %.

    >>> [round(end, 4) for end in wilson_interval(1.0, 100)]
    [0.963, 1.0]
    """
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)
