"""fusion predict: write a run's predictions for a manifest."""

import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from fusion.cli.options import Options, above_zero
from fusion.data.ledger import Ledger
from fusion.data.table import Table
from fusion.errors import UserError
from fusion.predictor import Predictions
from fusion.scoring import load_for, predict_rows, print_issues, rows_of
from fusion.settings.reading import HELP, inputs_for, is_run, reading_of, reading_options, settings_of
from fusion.tasks import Task
from fusion.training.callbacks.run_folder import OWN_FILES


def predict(arguments: Sequence[str]) -> int:
    """Run the command; gives the exit status."""
    what = "Write the predictions for every row of a manifest: the answer, probabilities, modalities present."
    options = Options("fusion predict", f"{what} {HELP}")
    options.add_argument("--run", required=True, help="run folder that fit printed, or a checkpoint file")
    options.add_argument("--manifest", required=True, help="CSV, JSON Lines or Parquet; labels are not needed")
    options.add_argument("--out", default="predictions.csv", help="file to write, .csv or .parquet")
    options.add_argument("--checkpoint", default="best", help="best or last")
    options.add_argument("--batch_size", type=above_zero, default=256)
    own, reading = reading_options(arguments)
    asked = options.parse_args(own)
    out = Path(asked.out).expanduser()
    if out.suffix not in (".csv", ".parquet"):
        raise UserError(f"--out {out}: expected a file that ends in .csv or .parquet")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; expected a file")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    run, issues = Path(asked.run).expanduser(), out.with_name(f"{out.stem}-data_issues.csv")
    refuse_to_overwrite(out, issues, run, asked.manifest)
    ledger = Ledger("drop")
    predictor = load_for(run, asked.checkpoint, ledger)
    columns, format = reading_of(run, reading)
    table = rows_of(asked.manifest, columns, format, inputs_for(predictor, columns, run), ledger, None)
    table, outputs = predict_rows(predictor, table, ledger, asked.batch_size)
    write(out, table, predictor.gather(outputs), predictor.processor.task)
    print(f"{len(table):,} predictions in {out}")
    print_issues(ledger, issues)
    return 0


def refuse_to_overwrite(out: Path, issues: Path, run: Path, manifest: str) -> None:
    """Raises UserError, before anything is predicted, where a file that is to be written is one to be kept, or can't be written."""
    kept = {"the manifest itself": manifest}
    if is_run(run):
        settings = settings_of(run)
        kept |= {f"the run's own data.{name}": settings.get(name) for name in ("manifest", "val_manifest", "test_manifest")}
        kept |= {f"the run's own {name}": str(run / name) for name in OWN_FILES}
    for path in (out, issues):
        listing = "" if path == out else f" (its list of samples that are left out: {path})"
        for what, other in kept.items():
            if other and is_same(path, Path(other).expanduser()):
                raise UserError(f"--out {out} would overwrite {what}{listing}; give another name")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UserError(f"--out {out} can't be written: no permission for {path if path.exists() else path.parent}")


def is_same(path: Path, other: Path) -> bool:
    return path.resolve() == other.resolve() or (path.exists() and other.exists() and path.samefile(other))


def write(out: Path, table: Table, predictions: Predictions, task: Task) -> None:
    """id, prediction, present_<modality>, and of a task with classes p_<class>: one row a sample."""
    columns: dict[str, list] = {"id": list(table.ids), "prediction": [task.cell_of(answer) for answer in predictions.answers]}
    columns |= {f"present_{name}": there.tolist() for name, there in predictions.present.items()}
    columns |= task.columns(predictions.values)
    made = pa.table(columns)
    try:
        if out.suffix == ".csv":
            pyarrow.csv.write_csv(made, out)
        else:
            pyarrow.parquet.write_table(made, out)
    except OSError as error:
        raise UserError(f"--out {out} can't be written: {error}") from error
