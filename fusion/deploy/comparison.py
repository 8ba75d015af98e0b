"""The table of a model before and after: size, latency, scores with their intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fusion.console import aligned
from fusion.deploy.exporting import graph_of
from fusion.deploy.graph import Graph
from fusion.deploy.latency import Latency, first_samples, latencies
from fusion.deploy.split_arrays import SplitArrays
from fusion.errors import UserError
from fusion.packages.runtimes import Runtime
from fusion.predictor import Predictor, model_of
from fusion.runs.bundle import WEIGHTS

BATCHES = (1, 32)  # samples of a call


@dataclass(frozen=True)
class Compared:
    """A model's file size, latency of calls of 1 and 32 samples, and by split its main score with a 95 % interval."""

    bytes: int
    latency: dict[int, Latency]
    scores: dict[str, tuple[float, float, float]]

    def plain(self) -> dict[str, Any]:
        latency = {str(batch): {"p50_ms": found.p50, "p99_ms": found.p99} for batch, found in self.latency.items()}
        return {"bytes": self.bytes, "latency": latency, "scores": {split: list(score) for split, score in self.scores.items()}}


def in_eager(graph: Graph) -> Runtime:
    """A graph run by PyTorch, operator by operator."""

    @torch.inference_mode()
    def run(arrays: Mapping[str, Any]) -> Any:
        return graph(*(torch.from_numpy(arrays[name]) for name in graph.names)).numpy()

    return run


def compare(models: Mapping[str, tuple[Runtime, int]], splits: Mapping[str, SplitArrays], *, seconds: float = 2.0) -> dict[str, Compared]:
    """Measures models beside each other, in one run.

    Args:
        models: by name, a model and the size of its file in bytes.
        splits: by name, the samples that they are scored on; those of the first are timed.
        seconds: of timing for each model and number of samples.
    """
    return compare_each({name: (model, size, splits) for name, (model, size) in models.items()}, seconds=seconds)


def compare_each(models: Mapping[str, tuple[Runtime, int, Mapping[str, SplitArrays]]], *, seconds: float = 2.0) -> dict[str, Compared]:
    """As `compare`, of models that preprocess the samples in different ways: each with its own."""
    times: dict[int, dict[str, Latency]] = {}
    for batch in BATCHES:
        arrays = {name: first_samples(next(iter(splits.values())).batches, batch) for name, (_, _, splits) in models.items()}
        times[batch] = latencies({name: partial(model, arrays[name]) for name, (model, _, _) in models.items()}, seconds=seconds)
    compared = {}
    for name, (model, size, splits) in models.items():
        scores = {}
        for split, samples in splits.items():
            values = samples.values(model)
            monitor = samples.task.monitor
            scores[split] = (samples.score(values, monitor), *samples.interval(values, monitor))
        compared[name] = Compared(size, {batch: times[batch][name] for batch in BATCHES}, scores)
    return compared


def compare_runs(
    runs: Mapping[str, tuple[str | Path, str]], splits: Sequence[str], *, samples: int | None = 2000, seconds: float = 2.0
) -> dict[str, Compared]:
    """Measures the models of runs beside each other, in PyTorch on the CPU.

    Args:
        runs: by name, the folder of a run and which checkpoint of it.
        splits: names of those that they are scored on; the first one's samples are timed.
        samples: number of samples of each split that are scored; None for all.
        seconds: of timing for each model and number of samples.

    Raises UserError without splits, and for a task or an input of which no graph can be made.
    """
    if not splits:
        raise UserError("the run has neither validation nor test samples")
    models: dict[str, tuple[Runtime, int, Mapping[str, SplitArrays]]] = {}
    for name, (run, checkpoint) in runs.items():
        path, _ = model_of(run, checkpoint)
        predictor = Predictor.from_file(path, device="cpu")
        graph = graph_of(predictor)
        own = {split: SplitArrays.of(Path(run), predictor, graph.preprocessors, split, samples) for split in splits}
        size = sum(weight.numel() * weight.element_size() for weight in predictor.model.state_dict().values())
        models[name] = in_eager(graph), size_of(path / WEIGHTS) if path.is_dir() else size, own
    return compare_each(models, seconds=seconds)


def table(compared: Mapping[str, Compared], score: str) -> str:
    """The table as text. score: the name of the main score."""
    first = next(iter(compared.values()))
    times = [f"{quantile} ms ({batch})" for quantile in ("p50", "p99") for batch in BATCHES]
    lines = [["", "MiB", *times, *(f"{score}, {split}" for split in first.scores)]]
    for name, one in compared.items():
        times = [f"{one.latency[b].p50:.2f}" for b in BATCHES] + [f"{one.latency[b].p99:.2f}" for b in BATCHES]
        scores = [f"{value:.4f} ({low:.4f} to {high:.4f})" for value, low, high in one.scores.values()]
        lines.append([name, f"{one.bytes / 2**20:.2f}", *times, *scores])
    return aligned(lines)


def size_of(*paths: Path) -> int:
    return sum(path.stat().st_size for path in paths)


def ratios(compared: Mapping[str, Compared], before: str, after: str) -> Sequence[str]:
    """Sentences about a model in terms of another one."""
    one, other = compared[before], compared[after]
    faster = ", ".join(f"{one.latency[b].p50 / other.latency[b].p50:.2f} times as fast at {b}" for b in BATCHES)
    return [f"{after} is {one.bytes / other.bytes:.2f} times smaller than {before}, {faster}"]
