"""fusion evaluate: score a run on any split or manifest, also by group."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from fusion.cli.options import Options, above_zero
from fusion.console import aligned, figure
from fusion.errors import UserError
from fusion.scoring import evaluate_run, print_issues
from fusion.settings.reading import HELP, reading_options

UNFIT = r'[/\\:*?"<>|\0]'  # for the name of a file


def evaluate(arguments: Sequence[str]) -> int:
    """Run the command; gives the exit status."""
    options = Options("fusion evaluate", f"Score a run on one of its splits, or on another manifest. {HELP}")
    options.add_argument("--run", required=True, help="run folder that fit printed")
    options.add_argument("--split", help="train, val or test, of the run's own data; test if neither is given")
    options.add_argument("--manifest", help="another manifest with labels, instead of a split")
    options.add_argument("--by", help="column of the manifest to score by")
    options.add_argument("--checkpoint", default="best", help="best or last")
    options.add_argument("--batch_size", type=above_zero, default=256)
    own, reading = reading_options(arguments)
    asked = options.parse_args(own)
    if asked.manifest and asked.split:
        raise UserError("give --split, of the run's own data, or --manifest, of which every row is scored; not both")
    split, run = asked.split or "test", Path(asked.run).expanduser()
    given = {"split": split, "manifest": asked.manifest, "by": asked.by or "", "checkpoint": asked.checkpoint}
    found = evaluate_run(run, **given, batch_size=asked.batch_size, reading=reading)
    task = found.task
    rows = [[f"{asked.by or ''}", *task.headline, task.baseline, "samples"]]
    for name, scores in found.scores.items():
        shown = [figure(scores[key]) if key in scores else "" for key in (*task.headline.values(), task.baseline)]
        rows.append([name, *shown, f"{scores['samples']:,}"])
    print(f"{asked.manifest or split} of {asked.run}\n\n{aligned(rows)}")
    print(f"\n{task.baseline}: the {task.bounded} of the best single answer for all samples of the row")
    if found.unseen:
        share = found.unseen / found.samples
        print(f"{found.unseen:,} samples ({share:.1%}) have a label that never occurred in training: always misses")
    print_issues(found.ledger, run / "evaluation_issues.csv")
    if not asked.manifest:
        by = f"-by-{re.sub(UNFIT, '_', asked.by)[:100]}" if asked.by else ""
        kept = run / f"evaluation-{split}{by}.json"
        kept.write_text(json.dumps(found.scores, indent=2) + "\n", encoding="utf-8")
    return 0
