"""fusion benchmark distilled: a small model trained alone and by a teacher, over several seeds, with the interval of the difference."""

import json
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fusion.console import aligned, silent
from fusion.errors import UserError
from fusion.evaluation.intervals import t_interval
from fusion.predictor import Predictor
from fusion.session import train
from fusion.settings.parser import FusionCLI

FIRST_TEACHER = 1000  # its seed, unlike those of the students
SPLITS = ("val", "test")


class Scores(NamedTuple):
    """Scores of the best epoch of a run, nan for a split without samples; and its number of parameters."""

    val: float
    test: float
    parameters: int


def benchmark_distilled(
    arguments: Sequence[str], seeds: int, teachers: int, teacher: str, given: Sequence[str], first_seed: int = 0
) -> int:
    """Train the teachers, then the student of these options with every seed alone and by the teachers; print both and their differences.

    teachers: how many, each with another seed; their probabilities are averaged. teacher: the options in which they differ from the
    student. given: finished runs to use instead. first_seed: of the students'.
    """
    if seeds < 2:
        raise UserError(f"--seeds is {seeds}; expected at least 2, from which an interval can be computed")
    if given and teacher:
        raise UserError("give either --teacher (options of the teachers to train) or --given (finished runs), not both")
    if not given and teachers < 1:
        raise UserError(f"--teachers is {teachers}; expected at least 1")
    alone = [*arguments, "--model.teacher=null"]
    task = FusionCLI(alone).model_and_data()[0].task
    title, name = next(iter(task.headline.items()))
    with tempfile.TemporaryDirectory() as folder:
        runs = list(given)
        for number in range(0 if given else teachers):
            options = [*alone, *shlex.split(teacher), f"--seed_everything={FIRST_TEACHER + number}", f"--runs={folder}/teachers"]
            runs.append(str(trained(options)))
        for run in runs:
            scores = scores_of(Path(run), name)
            print(f"teacher: {scores.parameters:,} parameters, {title} val {scores.val:.4f}, test {scores.test:.4f}", flush=True)
        ways = {"alone": alone, "distilled": [*arguments, f"--model.teacher.runs={json.dumps(runs)}"]}
        results: dict[str, list[Scores]] = {way: [] for way in ways}
        for seed in range(first_seed, first_seed + seeds):
            for way, options in ways.items():
                run_folder = trained([*options, f"--seed_everything={seed}", f"--runs={folder}/students"])
                results[way].append(scores_of(run_folder, name))
            val, test = ([getattr(found[-1], split) for found in results.values()] for split in SPLITS)
            print(f"seed {seed}: val {val[0]:.4f} alone, {val[1]:.4f} distilled; test {test[0]:.4f}, {test[1]:.4f}", flush=True)
    print(f"\n{table(title, results, first_seed)}")
    return 0


def trained(options: Sequence[str]) -> Path:
    """The folder of a run. Raises UserError if it fails."""
    with silent():
        outcome = train(options)
    if outcome.status or outcome.folder is None:
        raise UserError(f"the run {' '.join(options)} ended with status {outcome.status}: {outcome.message}")
    return outcome.folder


def scores_of(run: Path, name: str) -> Scores:
    """The scores of a run. Raises UserError for one that is not finished, or has no such score of both splits."""
    path = run.expanduser() / "results.json"
    if not path.is_file():
        raise UserError(f"{run} has no results.json; expected the folder of a finished run")
    results = json.loads(path.read_text(encoding="utf-8"))
    if not all(name in results[split] for split in SPLITS):
        raise UserError(f"{run} has no {name} of validation and test samples; both are reported")
    parameters = sum(p.numel() for p in Predictor.load(run, device="cpu").model.parameters())
    return Scores(results["val"][name], results["test"][name], parameters)


def table(title: str, results: dict[str, list[Scores]], first_seed: int = 0) -> str:
    """A line for each seed and the mean, with the paired differences, and the interval of the mean difference by t over the seeds."""
    ways = list(results)
    lines = [[title, *(f"{split}: {column}" for split in SPLITS for column in (*ways, "difference"))]]
    columns: list[list[float]] = []
    for split in SPLITS:
        alone, distilled = ([getattr(one, split) for one in results[way]] for way in ways)
        columns += [alone, distilled, [b - a for a, b in zip(alone, distilled, strict=True)]]
    formats = ["{:.4f}", "{:.4f}", "{:+.4f}"] * len(SPLITS)
    for seed, row in enumerate(zip(*columns, strict=True), first_seed):
        lines.append([f"seed {seed}", *(form.format(value) for form, value in zip(formats, row, strict=True))])
    means = [t_interval(column) for column in columns]
    lines.append(["mean", *(form.format(mean) for form, (mean, *_) in zip(formats, means, strict=True))])
    limits = [f"{low:+.4f} to {high:+.4f}" if i % 3 == 2 else "" for i, (_, low, high) in enumerate(means)]
    lines.append(["95 % interval", *limits])
    return f"student: {results[ways[0]][0].parameters:,} parameters\n\n{aligned(lines)}"
