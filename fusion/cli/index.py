"""fusion index: embed a manifest's images and texts for search."""

from collections.abc import Sequence
from pathlib import Path

from fusion.cli.options import Options, above_zero
from fusion.data.issues import DataIssues
from fusion.errors import UserError
from fusion.scoring import print_issues
from fusion.search import Index, free_or_index
from fusion.settings.reading import HELP, reading_options

INDEX = "index"  # folder name within a run's folder


def index(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    description = "Embed the items of a manifest (images, texts, or what the run pairs) for fusion search; a row may have one side alone."
    parser = Options("fusion index", f"{description} {HELP}")
    parser.add_argument("--run", required=True, help="folder of a run of the task Retrieval")
    parser.add_argument("--manifest", required=True, help="CSV, JSON Lines or Parquet file")
    parser.add_argument("--out", help="folder of the index; index in the run folder if not given")
    parser.add_argument("--checkpoint", default="best", help="best or last")
    parser.add_argument("--batch_size", type=above_zero, default=256)
    own, reading = reading_options(arguments)
    options = parser.parse_args(own)
    out = Path(options.out).expanduser() if options.out else Path(options.run).expanduser() / INDEX
    free_or_index(out)
    if not out.parent.is_dir():
        raise UserError(f"there is no folder {out.parent}")
    issues = DataIssues("drop")
    made = Index.build(
        options.run, options.manifest, checkpoint=options.checkpoint, batch_size=options.batch_size, reading=reading, issues=issues
    )
    made.save(out)
    counts = ", ".join(f"{len(rows):,} different items of {'+'.join(made.inputs_of(side))}" for side, rows in made.embeddings.items())
    print(f"{counts}, in {out}")
    print_issues(issues, out / "data_issues.csv")
    return 0
