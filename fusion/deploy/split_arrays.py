"""A split's samples as arrays, on which exported models are scored and calibrated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusion.data.issues import DataIssues
from fusion.errors import UserError
from fusion.evaluation.intervals import wilson_interval
from fusion.evaluation.scores import score
from fusion.packages.package import flat_arrays
from fusion.packages.runtimes import Runtime
from fusion.predictor import Predictor
from fusion.processing.preprocessor import Preprocessor
from fusion.scoring import run_rows
from fusion.tasks import Task

BATCH = 64
RESAMPLES = 200
SHARES = ("accuracy", "subset_accuracy")  # of right samples


@dataclass(frozen=True)
class SplitArrays:
    """The samples of a split, preprocessed once.

    batches: of at most 64 samples, by the names of a graph's inputs. cells: their targets.
    """

    task: Task
    batches: list[dict[str, np.ndarray]]
    cells: Sequence[str | None]

    @classmethod
    def of(
        cls, run: Path, predictor: Predictor, preprocessors: Mapping[str, Preprocessor], split: str, most: int | None = None
    ) -> "SplitArrays":
        """Reads a split of a run, in the run's own order.

        Args:
            run: folder of the run.
            predictor: its model.
            preprocessors: of its inputs.
            split: its name.
            most: number of samples, spread over the split; None for all.

        Raises UserError for a split that isn't there, and one of which no sample can be read.
        """
        issues = DataIssues("drop")
        table = run_rows(run, predictor, split, issues)
        if most is not None and len(table) > most:
            table = table.take(np.linspace(0, len(table) - 1, most).astype(int).tolist())
        batches, readable = [], []
        for start in range(0, len(table), BATCH):
            rows = range(start, min(start + BATCH, len(table)))
            unreadable: dict[int, UserError] = {}
            columns = {name: [table.inputs[name][i] for i in rows] for name in preprocessors}
            inputs = {name: preprocessor.batch(columns[name], unreadable) for name, preprocessor in preprocessors.items()}
            kept = [i for i in range(len(rows)) if i not in unreadable]
            if len(kept) < len(rows):
                inputs = {name: one.batch([columns[name][i] for i in kept], {}) for name, one in preprocessors.items()}
            readable += [rows[i] for i in kept]
            if kept:
                batches.append(flat_arrays(inputs))
        if not readable:
            raise UserError(f"no sample of the split '{split}' of {run} can be read")
        return cls(predictor.processor.task, batches, [table.labels[i] for i in readable])

    def __len__(self) -> int:
        return len(self.cells)

    def values(self, runtime: Runtime) -> np.ndarray:
        """The values (n, K) of a model for all samples."""
        return np.concatenate([runtime(batch) for batch in self.batches])

    def score(self, values: np.ndarray, name: str) -> float:
        """One score of values (n, K)."""
        return score(self.task, torch.from_numpy(values), self.cells).get(name, float("nan"))

    def changed(self, values: np.ndarray, before: np.ndarray) -> float:
        """The share of samples of which a class or a set of labels is another one than before; numbers always differ a little."""
        now, then = self.task.answers(values), self.task.answers(before)
        return float(np.mean([without_numbers(one) != without_numbers(other) for one, other in zip(now, then, strict=True)]))

    def interval(self, values: np.ndarray, name: str) -> tuple[float, float]:
        """A 95 % interval of a score over the drawing of samples: Wilson's for a share of right samples, which also holds near 0 and 1; for
        others the percentile bootstrap, always with the same 200 resamples."""
        if name in SHARES:
            return wilson_interval(self.score(values, name), len(self))
        rng, target = np.random.default_rng(0), torch.from_numpy(self.task.encode(self.cells))
        found = []
        for _ in range(RESAMPLES):
            rows = torch.from_numpy(rng.integers(0, len(self), len(self)))
            metrics = self.task.metrics()
            self.task.update(metrics, torch.from_numpy(values)[rows], target[rows])
            found.append(float(self.task.scores(metrics).get(name, torch.tensor(float("nan")))))
        low, high = np.nanquantile(found, [0.025, 0.975])
        return float(low), float(high)


def without_numbers(answer: Any) -> Any:
    """
    >>> without_numbers({"tags": ["red"], "price": 1.5, "size": [1.0, 2.0]})
    {'tags': ['red'], 'price': None, 'size': [None, None]}
    """
    if isinstance(answer, Mapping):
        return {name: without_numbers(one) for name, one in answer.items()}
    if isinstance(answer, list):
        return [without_numbers(one) for one in answer]
    return None if isinstance(answer, float) else answer


def lost(task: Task, before: float, after: float) -> float:
    """How much of the task's main score is lost: the difference, or of a score that is minimised the increase as a share."""
    if task.mode == "max":
        return before - after
    return (after - before) / before if before else after - before
