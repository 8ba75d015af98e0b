"""fusion benchmark pretrained: every head on shares of the training data, with several seeds: validation and test accuracy."""

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
    """What one run gave: the validation accuracy of its best epoch, the test accuracy of that epoch, how many updates it made."""

    recipe: str  # a digest of the settings that all runs share
    share: str
    head: str
    seed: int
    val: float
    test: float
    updates: int
    image: float  # upper bounds on the test samples; NaN where inputs hardly repeat
    text: float
    majority: float


def benchmark_pretrained(arguments: Sequence[str], pattern: str, seeds: int, shares: Sequence[str], kept: Path | None) -> int:
    """Train with these arguments for every head that matches, seed and share of the training samples; print accuracies over the seeds.

    shares: numbers of training samples, or "all". kept: a CSV file to which each run adds a line, and whose runs of
    the same recipe are not made again.
    """
    names = available(pattern)
    if not names:
        raise UserError(f"no head matches '{pattern}'. {nearest(pattern, available())}")
    for share in shares:
        if share != ALL and not share.isdigit():
            raise UserError(f"--shares: '{share}' is no number of samples; expected such as 400, or {ALL}")
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}; expected at least 1")
    recipe = blake2b(FusionCLI(arguments).resolved().encode(), digest_size=6).hexdigest()
    scores = [score for score in read_scores(kept) if score.recipe == recipe]
    there = {(score.share, score.head, score.seed) for score in scores}
    for seed, share, name in product(range(seeds), shares, names):  # cut short, it has every head
        if (share, name, seed) not in there:
            scores.append(score_of(arguments, recipe, share, name, seed))
            print(f"{share} samples, {name}, seed {seed}: val {scores[-1].val:.4f}  {scores[-1].updates} updates", flush=True)
            add_score(kept, scores[-1])
    print(f"\n{table(scores, names, shares, seeds)}")
    return 0


def score_of(arguments: Sequence[str], recipe: str, share: str, name: str, seed: int) -> Score:
    """Train once. Raises UserError where a run doesn't end, or has no validation or test samples to score."""
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
    """A row a head: for each share, mean (lowest to highest) over the seeds; then what needs no fusion."""
    rows = [["training samples", *(cell for share in shares for cell in (f"{share}: val", f"{share}: test"))]]
    for name in names:
        rows.append([name])
        for share in shares:
            found = [score for score in scores if (score.share, score.head) == (share, name) and score.seed < seeds]
            rows[-1] += [spread([score.val for score in found]), spread([score.test for score in found])]
    for of, words in BOUNDS.items():
        bound: float = getattr(scores[-1], of)
        if not math.isnan(bound):
            rows.append([words, *(cell for _ in shares for cell in ("", f"{bound:.4f}"))])
    return aligned(rows)


def spread(accuracies: Sequence[float]) -> str:
    return f"{statistics.mean(accuracies):.3f} ({min(accuracies):.3f} to {max(accuracies):.3f})"


def read_scores(kept: Path | None) -> list[Score]:
    if kept is None or not kept.is_file():
        return []
    with open(kept, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if tuple(rows.fieldnames or ()) != Score._fields:
            raise UserError(f"--csv {kept}: its columns are not {', '.join(Score._fields)}; give a new file")
        return [Score(*(kind(row[name]) for name, kind in Score.__annotations__.items())) for row in rows]


def add_score(kept: Path | None, score: Score) -> None:
    if kept is None:
        return
    begun = kept.is_file()
    with open(kept, "a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([*([] if begun else [Score._fields]), score])
