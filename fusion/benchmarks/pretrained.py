"""fusion benchmark pretrained: validation and test accuracy of every head on fractions of the training data, with several seeds."""

import csv
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from hashlib import blake2b
from itertools import product
from pathlib import Path
from typing import NamedTuple

from fusion.console import aligned, silent
from fusion.errors import UserError, nearest
from fusion.heads import available
from fusion.session import train
from fusion.settings.parser import FusionCLI

ALL = "all"
BOUNDS = {"image": "upper bound (image only)", "text": "upper bound (text only)", "majority": "majority class"}


class Score(NamedTuple):
    """The result of a run: validation and test accuracy of its best epoch, its number of updates, and the bounds."""

    recipe: str  # hash of the settings common to all runs
    share: str
    head: str
    seed: int
    val: float
    test: float
    updates: int
    image: float  # upper bounds on the test samples; NaN where inputs hardly repeat
    text: float
    majority: float


def benchmark_pretrained(arguments: Sequence[str], pattern: str, seeds: int, shares: Sequence[str], csv_file: Path | None) -> int:
    """Train every matching head with every seed on every share of the training samples; print accuracies over the seeds.

    shares: numbers of training samples, or "all". csv_file: file to which each run adds a line; runs of the same recipe that are already
    in it are not repeated.
    """
    names = available(pattern)
    if not names:
        raise UserError(f"no head matches '{pattern}'. {nearest(pattern, available())}")
    for share in shares:
        if share != ALL and not share.isdigit():
            raise UserError(f"--shares: '{share}' is not a number of samples; expected for example 400, or {ALL}")
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}; expected at least 1")
    recipe = blake2b(FusionCLI(arguments).resolved().encode(), digest_size=6).hexdigest()
    scores = [score for score in read_scores(csv_file) if score.recipe == recipe]
    finished = {(score.share, score.head, score.seed) for score in scores}
    for seed, share, name in product(range(seeds), shares, names):  # seeds outermost: an interrupted benchmark has results for every head
        if (share, name, seed) not in finished:
            scores.append(score_of(arguments, recipe, share, name, seed))
            print(f"{share} samples, {name}, seed {seed}: val {scores[-1].val:.4f}  {scores[-1].updates} updates", flush=True)
            add_score(csv_file, scores[-1])
    print(f"\n{table(scores, names, shares, seeds)}")
    return 0


def score_of(arguments: Sequence[str], recipe: str, share: str, name: str, seed: int) -> Score:
    """Train once. Raises UserError if the run fails, or has no validation or test samples to score."""
    options = [f"--model.head={name}", f"--seed_everything={seed}", *([] if share == ALL else [f"--data.train_samples={share}"])]
    with tempfile.TemporaryDirectory() as folder:
        with silent():
            outcome = train([*arguments, *options, f"--runs={folder}"])
        if outcome.status or outcome.folder is None:
            raise UserError(f"the run {' '.join(options)} ended with status {outcome.status}: {outcome.message}")
        results = json.loads((outcome.folder / "results.json").read_text(encoding="utf-8"))
    val = results["val"].get("accuracy")
    if val is None or "accuracy" not in results["test"]:
        raise UserError("the recipe's data has no validation or no test samples; both are reported")
    test = results["test"]
    return Score(
        recipe, share, name, seed, val, test["accuracy"], results["updates"], *(test.get(f"ceiling_{of}", math.nan) for of in BOUNDS)
    )


def table(scores: Sequence[Score], names: Sequence[str], shares: Sequence[str], seeds: int) -> str:
    """A line per head with, for each share, the mean (lowest to highest) over the seeds; then the bounds."""
    lines = [["training samples", *(title for share in shares for title in (f"{share}: val", f"{share}: test"))]]
    for name in names:
        lines.append([name])
        for share in shares:
            matching = [score for score in scores if (score.share, score.head) == (share, name) and score.seed < seeds]
            lines[-1] += [spread([score.val for score in matching]), spread([score.test for score in matching])]
    for of, title in BOUNDS.items():
        bound: float = getattr(scores[-1], of)
        if not math.isnan(bound):
            lines.append([title, *(entry for _ in shares for entry in ("", f"{bound:.4f}"))])
    return aligned(lines)


def spread(accuracies: Sequence[float]) -> str:
    return f"{statistics.mean(accuracies):.3f} ({min(accuracies):.3f} to {max(accuracies):.3f})"


def read_scores(csv_file: Path | None) -> list[Score]:
    if csv_file is None or not csv_file.is_file():
        return []
    with open(csv_file, newline="", encoding="utf-8") as file:
        records = csv.DictReader(file)
        if tuple(records.fieldnames or ()) != Score._fields:
            raise UserError(f"--csv {csv_file}: its columns are not {', '.join(Score._fields)}; give a new file")
        return [Score(*(kind(record[name]) for name, kind in Score.__annotations__.items())) for record in records]


def add_score(csv_file: Path | None, score: Score) -> None:
    if csv_file is None:
        return
    exists = csv_file.is_file()
    with open(csv_file, "a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([*([] if exists else [Score._fields]), score])
