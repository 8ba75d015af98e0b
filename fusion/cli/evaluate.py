"""fusion evaluate: score a run on any split or manifest, also by group."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from fusion.cli.options import Options, above_zero
from fusion.console import aligned, figure
from fusion.errors import UserError
from fusion.hub_files import is_hub_name
from fusion.scoring import evaluate_run, print_issues
from fusion.settings.reading import HELP, reading_options

NOT_IN_FILE_NAMES = r'[/\\:*?"<>|\0]'


def evaluate(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    parser = Options("fusion evaluate", f"Score a run on one of its splits, or on another manifest. {HELP}")
    parser.add_argument("--run", required=True, help="run folder printed by fit")
    parser.add_argument("--split", help="train, val or test split of the run's own data; test if neither this nor --manifest is given")
    parser.add_argument("--manifest", help="another manifest with labels, scored instead of a split")
    parser.add_argument("--by", help="column of the manifest by which samples are grouped")
    parser.add_argument("--classes", action="store_true", help="also the scores of each class or label by itself")
    parser.add_argument("--rerank", type=above_zero, help="number of first candidates that a retrieval run's matcher orders anew")
    parser.add_argument("--checkpoint", default="best", help="best or last")
    parser.add_argument("--batch_size", type=above_zero, default=256)
    own, reading = reading_options(arguments)
    options = parser.parse_args(own)
    if options.manifest and options.split:
        raise UserError("give either --split (of the run's own data) or --manifest (whose rows are all scored), not both")
    if is_hub_name(options.run):
        raise UserError(
            f"--run {options.run}: evaluate scores run folders, and a hub has the model alone; use fusion predict, or fusion.load"
        )
    split, run = options.split or "test", Path(options.run).expanduser()
    selection = {
        "split": split,
        "manifest": options.manifest,
        "by": options.by or "",
        "checkpoint": options.checkpoint,
        "by_class": options.classes,
        "rerank": options.rerank or 0,
    }
    evaluation = evaluate_run(run, **selection, batch_size=options.batch_size, reading=reading)
    task = evaluation.task
    lines = [[f"{options.by or ''}", *task.headline, task.baseline, "samples"]]
    for name, scores in evaluation.scores.items():
        entries = [figure(scores[key]) if key in scores else "" for key in (*task.headline.values(), task.baseline)]
        lines.append([name, *entries, f"{scores['samples']:,}"])
    print(f"{options.manifest or split} of {options.run}\n\n{aligned(lines)}")
    print(f"\n{task.baseline}: the {task.bounded} of the best constant prediction for the samples of each line")
    if options.classes:
        print(f"\n{aligned(class_lines(evaluation.classes))}")
    if evaluation.unseen:
        share = evaluation.unseen / evaluation.samples
        print(f"{evaluation.unseen:,} samples ({share:.1%}) have a label that never occurred in training, and always count as wrong")
    print_issues(evaluation.issues, run / "evaluation_issues.csv")
    if not options.manifest:
        by = f"-by-{re.sub(NOT_IN_FILE_NAMES, '_', options.by)[:100]}" if options.by else ""
        scores_file = run / f"evaluation-{split}{by}.json"
        scores_file.write_text(json.dumps(evaluation.scores, indent=2) + "\n", encoding="utf-8")
        if options.classes:
            classes_file = run / f"evaluation-{split}-classes.json"
            classes_file.write_text(json.dumps(evaluation.classes, indent=2) + "\n", encoding="utf-8")
    return 0


def class_lines(classes: dict[str, dict[str, float]]) -> list[list[str]]:
    """A table of the scores of each class."""
    names = list(dict.fromkeys(name for scores in classes.values() for name in scores if name != "samples"))
    lines = [["", *names, "samples"]]
    for label, scores in classes.items():
        lines.append([label, *(figure(scores[name]) if name in scores else "" for name in names), f"{scores['samples']:,.0f}"])
    return lines
