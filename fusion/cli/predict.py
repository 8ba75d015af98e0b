"""fusion predict: write a run's predictions for a manifest."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from fusion.cli.options import Options, above_zero
from fusion.data.issues import DataIssues
from fusion.data.table import Table
from fusion.deploy.hub import model_folder
from fusion.errors import UserError
from fusion.hub_files import is_hub_name
from fusion.predictions import Predictions
from fusion.scoring import load_for, predict_rows, print_issues, rows_of
from fusion.settings.reading import HELP, inputs_for, is_run, reading_of, reading_options, settings_of
from fusion.tasks import Task
from fusion.training.callbacks.run_folder import OWN_FILES


def predict(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    description = "Write the predictions for every row of a manifest: the answer, the probabilities and which modalities are present."
    parser = Options("fusion predict", f"{description} {HELP}")
    parser.add_argument("--run", required=True, help="run folder printed by fit, a checkpoint file, or hf://USER/NAME[@REVISION]")
    parser.add_argument("--manifest", required=True, help="CSV, JSON Lines or Parquet file; labels are not needed")
    parser.add_argument("--out", default="predictions.csv", help="file to write, .csv or .parquet")
    parser.add_argument("--checkpoint", default="best", help="best or last")
    parser.add_argument("--batch_size", type=above_zero, default=256)
    trusted = "packages outside fusion whose classes the model may have, which are imported; a model of a hub has no other ones"
    parser.add_argument("--trusted", nargs="+", default=[], help=trusted)
    own, reading = reading_options(arguments)
    options = parser.parse_args(own)
    out = Path(options.out).expanduser()
    if out.suffix not in (".csv", ".parquet"):
        raise UserError(f"--out {out}: expected a file that ends in .csv or .parquet")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; expected a file")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    of_hub = is_hub_name(options.run)
    run = model_folder(options.run) if of_hub else Path(options.run).expanduser()
    issues_path = out.with_name(f"{out.stem}-data_issues.csv")
    check_output_paths(out, issues_path, run, options.manifest)
    issues = DataIssues("drop")
    predictor = load_for(run, options.checkpoint, issues, options.trusted if of_hub or options.trusted else None)
    columns, format = reading_of(run, reading)
    table = rows_of(options.manifest, columns, format, inputs_for(predictor, columns, run), issues, None)
    table, outputs = predict_rows(predictor, table, issues, options.batch_size)
    values = np.concatenate([values for values, _ in outputs])
    write(out, table, predictor.gather(outputs), predictor.processor.task, values)
    print(f"{len(table):,} predictions in {out}")
    print_issues(issues, issues_path)
    return 0


def check_output_paths(out: Path, issues_path: Path, run: Path, manifest: str) -> None:
    """Raises UserError, before anything is predicted, if an output file would overwrite a file of the run, or can't be written."""
    protected = {"the manifest itself": manifest}
    if is_run(run):
        settings = settings_of(run)
        protected |= {f"the run's own data.{name}": settings.get(name) for name in ("manifest", "val_manifest", "test_manifest")}
        protected |= {f"the run's own {name}": str(run / name) for name in OWN_FILES}
    for path in (out, issues_path):
        listing = "" if path == out else f" (its list of skipped samples: {path})"
        for what, other in protected.items():
            if other and is_same(path, Path(other).expanduser()):
                raise UserError(f"--out {out} would overwrite {what}{listing}; give another name")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UserError(f"--out {out} can't be written: no permission for {path if path.exists() else path.parent}")


def is_same(path: Path, other: Path) -> bool:
    return path.resolve() == other.resolve() or (path.exists() and other.exists() and path.samefile(other))


def write(out: Path, table: Table, predictions: Predictions, task: Task, values: np.ndarray) -> None:
    """Write one row per sample: id, prediction, present_<modality>, and p_<class> for tasks with classes."""
    columns: dict[str, list] = {"id": list(table.ids), "prediction": [task.cell_of(answer) for answer in predictions.answers]}
    columns |= {f"present_{name}": present.tolist() for name, present in predictions.present.items()}
    columns |= task.columns(values)
    output = pa.table(columns)
    try:
        if out.suffix == ".csv":
            pyarrow.csv.write_csv(output, out)
        else:
            pyarrow.parquet.write_table(output, out)
    except OSError as error:
        raise UserError(f"--out {out} can't be written: {error}") from error
