"""The Python door: train by recipe as the command does, and use what came of it."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fusion.data.image_paths import FILE_URL, URL
from fusion.data.kinds import ImageInput, Kind
from fusion.errors import INTERRUPTED, REQUEUE, UserError
from fusion.predictor import Predictions, Predictor
from fusion.rebuilding import class_of
from fusion.scoring import evaluate_run
from fusion.session import run_name, settled
from fusion.session import train as train_by
from fusion.training.callbacks.run_folder import METRICS, read_metrics


class Run:
    """A run folder, to be asked: what a training gave.

    Args:
        folder: of the run.

    Raises UserError for a folder that is none.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        if not (self.folder / "recipe.yaml").is_file():
            raise UserError(f"{self.folder} has no recipe.yaml; expected a run folder")

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @property
    def history(self) -> list[dict[str, float]]:
        """What was logged, a dict for each step and each epoch, as in metrics.csv."""
        path = self.folder / METRICS
        rows = read_metrics(path) if path.is_file() else []
        return [{name: float(value) for name, value in row.items()} for row in rows]

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """The best checkpoint's scores by split: "test", if it was tested, and "val", if it was validated."""
        path = self.folder / "results.json"
        found: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return {split: found[split] for split in ("test", "val") if found.get(split)}

    @cached_property
    def predictor(self) -> Predictor:
        """The model of the best checkpoint, ready to be asked."""
        return Predictor.load(self.folder)

    def predict(self, images: Any = None, texts: Any = None, **inputs: Any) -> Predictions:
        """The answers for samples: see Predictor.predict."""
        return self.predictor.predict(images, texts, **inputs)

    def evaluate(self, split: str | None = None, *, manifest: Any = None, by: str = "") -> dict[str, dict[str, float]]:
        """Scores by "all" and, if asked, by the values of a column.

        Args:
            split: train, val or test, of the run's own data; test if neither is given.
            manifest: another table with labels instead: a file, a data frame, an Arrow table or a dict of columns.
            by: column to score by.
        """
        if manifest is not None and split is not None:
            raise UserError("give split, of the run's own data, or manifest, of which every row is scored; not both")
        if manifest is not None and not isinstance(manifest, str | os.PathLike):
            manifest = written(
                manifest, "manifest", self.folder / "tables", picture_columns(["--config", str(self.folder / "recipe.yaml")])
            )
        return evaluate_run(self.folder, split=split or "test", manifest=manifest and os.fspath(manifest), by=by).scores


def fit(
    recipe: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    train: Any = None,
    val: Any = None,
    test: Any = None,
    runs: str | os.PathLike[str] = "runs",
    resume: str | os.PathLike[str] | None = None,
) -> Run:
    """Train by recipe, as `fusion fit` does, and score the best checkpoint.

    What the command would print goes to the logger "fusion": logging.basicConfig(level=logging.INFO) shows it.

    Args:
        recipe: a name under recipes/ or the path of a YAML file; several are stacked, later ones win.
        options: by dotted keys, as on the command line: {"trainer.max_epochs": 3, "model.head": "Gated"}.
        train: the manifest: a file, a data frame, an Arrow table or a dict of columns. Paths in a table are taken from the working folder.
        val: a table of its own for validation; else a share is carved out of train.
        test: a table of its own for testing, likewise.
        runs: folder under which the run's folder is made.
        resume: a run's folder, to go on where it stopped, instead of a recipe.

    Raises UserError for everything that is wrong with recipe, options or data, KeyboardInterrupt where a signal stopped the run (which is
    saved and may be resumed), RuntimeError where another rank was lost.
    """
    recipes = [recipe] if isinstance(recipe, str | os.PathLike) else list(recipe or ())
    words = [f"--recipe={os.fspath(one)}" for one in recipes]
    words += [f"--{name}={as_option(value)}" for name, value in (options or {}).items()]
    if resume is not None:
        if recipes:
            raise UserError("give a recipe, to begin a run, or resume, to go on with one; not both")
        words.append(f"--resume={os.fspath(resume)}")
    else:
        words.append(f"--runs={os.fspath(runs)}")
    given = {"manifest": train, "val_manifest": val, "test_manifest": test}
    given = {name: table for name, table in given.items() if table is not None}
    if given and resume is not None:
        raise UserError("a run that goes on keeps its data; leave out train, val and test")
    if given:
        tables = Path(runs) / run_name(words) / "tables"
        in_memory = any(not isinstance(table, str | os.PathLike) for table in given.values())
        pictures = picture_columns([*words, "--data.manifest=-", "--data.preparer=null"]) if in_memory else []
        words.append("--data.preparer=null")
        for name, table in given.items():
            path = os.fspath(table) if isinstance(table, str | os.PathLike) else written(table, name, tables, pictures)
            words.append(f"--data.{name}={path}")
    outcome = train_by(words)
    if outcome.status in (INTERRUPTED, REQUEUE):
        raise KeyboardInterrupt(outcome.message)
    if outcome.status:
        raise RuntimeError(outcome.message)
    assert outcome.folder is not None
    return Run(outcome.folder)


def as_option(value: Any) -> str:
    """
    >>> [as_option(value) for value in ("Gated", 3, True, None, {"image": {"until_update": 5}}, [1, 2])]
    ['Gated', '3', 'true', 'null', '{"image": {"until_update": 5}}', '[1, 2]']
    """
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value if isinstance(value, str) else json.dumps(value, default=lambda one: one.item())  # NumPy's scalars


def picture_columns(words: Sequence[str]) -> list[str]:
    """The columns of a manifest that name pictures, by the settings."""
    config = settled(words)[0].config
    inputs = config.data.inputs or {}
    is_picture = {name: issubclass(class_of({"class": kind.class_path}, Kind), ImageInput) for name, kind in inputs.items()}
    named = [kind.init_args.column for name, kind in inputs.items() if is_picture[name]]
    return [*named, *([] if "image" in inputs else [config.data.columns.image])]


def written(table: Any, name: str, folder: Path, pictures: Sequence[str]) -> str:
    """The Parquet file of a table in memory, named by its contents; relative paths of pictures are those from the working folder.

    Raises UserError for what is no table, and for columns that Parquet can't hold.
    """
    try:
        if hasattr(table, "to_arrow"):  # polars
            table = table.to_arrow()
        elif hasattr(table, "columns") and hasattr(table, "to_numpy"):
            table = pa.Table.from_pandas(table, preserve_index=False)
        elif isinstance(table, Mapping):
            table = pa.table({column: list(cells) for column, cells in table.items()})
        if not isinstance(table, pa.Table):
            raise UserError(f"{name} is a {type(table).__name__}; expected a file, a data frame, an Arrow table or a dict of columns")
        for column in set(pictures) & set(table.column_names):
            kind = table.schema.field(column).type
            cells = [from_working_folder(cell) for cell in table.column(column).to_pylist()]
            made = pa.array(cells) if pa.types.is_dictionary(kind) else pa.array(cells, kind)
            table = table.set_column(table.column_names.index(column), column, made)
        folder.mkdir(parents=True, exist_ok=True)
        making = folder / f".{name}-{os.getpid()}.parquet"
        pq.write_table(table, making)
    except (pa.ArrowException, ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name} can't be written as Parquet: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise UserError(f"can't write the table {name} to {folder}: {error.strerror or error}. Another place: runs=FOLDER") from error
    path = folder / f"{name}-{hashlib.sha256(making.read_bytes()).hexdigest()[:12]}.parquet"
    os.replace(making, path)
    return str(path)


def from_working_folder(cell: Any) -> Any:
    """A picture's cell with its paths made absolute; what is no plain path (a URL, ~) is left to the manifest's reader.

    >>> from_working_folder(["/a.png", None, "~/b.png"]), from_working_folder(b"picture")
    (['/a.png', None, '~/b.png'], b'picture')
    """
    if isinstance(cell, list):
        return [from_working_folder(one) for one in cell]
    if isinstance(cell, dict):
        return cell | {"path": from_working_folder(cell.get("path"))} if "path" in cell else cell
    if not isinstance(cell, str) or not cell or cell.isspace() or cell.startswith("~") or URL.match(cell) or FILE_URL.match(cell):
        return cell
    if cell.lstrip().startswith("["):
        try:
            return json.dumps([from_working_folder(one) for one in json.loads(cell)])
        except (ValueError, TypeError, RecursionError):  # a path that begins so
            pass
    return os.path.abspath(cell)
