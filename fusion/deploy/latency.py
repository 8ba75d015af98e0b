"""Latency of models beside each other, in one run."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

WARM_UP = 5


@dataclass(frozen=True)
class Latency:
    """Times of one call in ms: median and 99th percentile."""

    p50: float
    p99: float


def latencies(calls: Mapping[str, Callable[[], object]], *, seconds: float = 2.0, rounds: int = 5) -> dict[str, Latency]:
    """The latency of each call, by name; the calls take turns, so that a noisy machine is noisy for all of them.

    Args:
        calls: what is measured, by name.
        seconds: of all rounds together, for each call.
        rounds: number of turns.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            end = time.perf_counter() + seconds / rounds
            while (start := time.perf_counter()) < end or not times[name]:
                call()
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: Latency(*np.quantile(found, [0.5, 0.99]).tolist()) for name, found in times.items()}


def first_samples(batches: Sequence[Mapping[str, np.ndarray]], count: int) -> dict[str, np.ndarray]:
    """A batch of `count` samples by the names of a graph's inputs: repeated where there are fewer."""
    first = batches[0]
    of_several = {name.removesuffix("_image_index") for name in first if name.endswith("_image_index")}
    pixels = {f"{name}_pixels" for name in of_several}  # as many as there are images, which the samples refer to
    available = next(len(array) for name, array in first.items() if name not in pixels)
    return {name: array if name in pixels else array[np.arange(count) % available] for name, array in first.items()}
