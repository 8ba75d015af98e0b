"""fusion predict: write a run's predictions for a manifest."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from fusion.cli.evaluate import data_of
from fusion.cli.options import Options
from fusion.cli.rows import predict_rows
from fusion.data.format import Format
from fusion.data.ledger import Ledger
from fusion.data.table import Columns, Table, read_table
from fusion.errors import UserError
from fusion.predictor import Predictions, Predictor


def predict(arguments: Sequence[str]) -> int:
    """Run the command; gives the exit status."""
    options = Options("fusion predict", "Write the predictions for every row of a manifest: class, probabilities, modalities present.")
    options.add_argument("--run", required=True, help="run folder that fit printed, or a checkpoint file")
    options.add_argument("--manifest", required=True, help="CSV, JSON Lines or Parquet; labels are not needed")
    options.add_argument("--out", default="predictions.csv", help="file to write, .csv or .parquet")
    options.add_argument("--checkpoint", default="best", help="best or last")
    options.add_argument("--batch_size", type=int, default=256)
    asked = options.parse_args(list(arguments))
    out = Path(asked.out)
    if out.suffix not in (".csv", ".parquet"):
        raise UserError(f"--out {out}: expected a file that ends in .csv or .parquet")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    predictor = Predictor.load(asked.run, checkpoint=asked.checkpoint)
    columns, format = Columns(), Format()
    if Path(asked.run).is_dir():
        data = data_of(Path(asked.run))
        columns, format = data.columns, data.format
    ledger = Ledger("drop")
    table = read_table(asked.manifest, columns, tuple(predictor.modalities), need_label=False, ledger=ledger, format=format)
    table, predictions = predict_rows(predictor, table, ledger, asked.batch_size)
    write(out, table, predictions)
    print(f"{len(table):,} predictions in {out}")
    if ledger.issues:
        issues = out.with_name("data_issues.csv")
        ledger.write(issues)
        print(f"warning: {ledger.summary().replace('data_issues.csv', str(issues))}")
    for note in ledger.notes:
        print(f"note: {note}")
    return 0


def write(out: Path, table: Table, predictions: Predictions) -> None:
    """id, prediction, present_<modality>, p_<class>: one row a sample."""
    columns: dict[str, list] = {"id": table.ids, "prediction": predictions.labels}
    columns |= {f"present_{name}": there.tolist() for name, there in predictions.present.items()}
    columns |= {f"p_{label}": predictions.probabilities[:, i].tolist() for i, label in enumerate(predictions.classes)}
    made = pa.table(columns)
    if out.suffix == ".csv":
        pyarrow.csv.write_csv(made, out)
    else:
        pyarrow.parquet.write_table(made, out)
