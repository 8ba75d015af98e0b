"""The Python interface: train from a recipe, as the command does, and use the trained model."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fusion.data.kinds import ImageInput, Kind
from fusion.deploy.hub import push_run
from fusion.errors import INTERRUPTED, REQUEUE, UserError
from fusion.predictions import Predictions
from fusion.predictor import Predictor
from fusion.processing.image_paths import FILE_URL, URL
from fusion.rebuilding import class_of
from fusion.scoring import evaluate_run
from fusion.search import Index
from fusion.session import parse_settings, run_name
from fusion.session import train as train_by
from fusion.training.callbacks.run_folder import METRICS, read_metrics


class Run:
    """A finished run: its scores, its logged metrics and its model.

    Args:
        folder: the run folder.

    Raises UserError for a folder that is not a run folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        if not (self.folder / "recipe.yaml").is_file():
            raise UserError(f"{self.folder} has no recipe.yaml; expected a run folder")

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @property
    def history(self) -> list[dict[str, float]]:
        """The logged metrics, one dict for each record of metrics.csv."""
        path = self.folder / METRICS
        records = read_metrics(path) if path.is_file() else []
        return [{name: float(value) for name, value in record.items()} for record in records]

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """The best checkpoint's scores by split: "test" if it was tested, "val" if it was validated."""
        path = self.folder / "results.json"
        results: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return {split: results[split] for split in ("test", "val") if results.get(split)}

    @cached_property
    def predictor(self) -> Predictor:
        """The model of the best checkpoint."""
        return Predictor.load(self.folder)

    def predict(self, images: Any = None, texts: Any = None, **inputs: Any) -> Predictions:
        """Predictions for samples: see Predictor.predict."""
        return self.predictor.predict(images, texts, **inputs)

    def index(self, manifest: Any, folder: str | os.PathLike[str] | None = None) -> Index:
        """The embeddings of a table's images, texts or whatever a run of the task Retrieval pairs: see Index.search.

        Args:
            manifest: a file, a data frame, an Arrow table or a dict of columns; a row may have one side alone.
            folder: where to save the index, so that Index.load and `fusion search` find it. None: it is not saved.
        """
        made = Index.build(self.folder, self.table_file(manifest))
        if folder is not None:
            made.save(os.fspath(folder))
        return made

    def evaluate(self, split: str | None = None, *, manifest: Any = None, by: str = "") -> dict[str, dict[str, float]]:
        """Scores of all samples ("all") and, if given, by the values of a column.

        Args:
            split: train, val or test split of the run's own data; test if neither this nor manifest is given.
            manifest: another table with labels, scored instead of a split: a file, a data frame, an Arrow table or a dict of columns.
            by: column by which samples are grouped.
        """
        if manifest is not None and split is not None:
            raise UserError("give either split (of the run's own data) or manifest (whose rows are all scored), not both")
        file = None if manifest is None else self.table_file(manifest)
        return evaluate_run(self.folder, split=split or "test", manifest=file, by=by).scores

    def push(self, repository: str, *, private: bool = False, message: str = "", licence: str | None = None) -> str:
        """Upload the model with a model card to the Hugging Face Hub, as `fusion push` does; returns the page of the commit.

        Args:
            repository: USER/NAME, which is made if there is none.
            private: make a repository that only its owners can read.
            message: of the commit; the run's name if empty.
            licence: of the model, as the hub spells it (apache-2.0); None: that of its pretrained encoders, if they have one in common.
        """
        return push_run(self.folder, repository, private=private, message=message, licence=licence).page

    def table_file(self, table: Any) -> str:
        """The path of a table, which is written to the run folder if it is in memory."""
        if isinstance(table, str | os.PathLike):
            return os.fspath(table)
        return write_table(table, "manifest", self.folder / "tables", image_columns(["--config", str(self.folder / "recipe.yaml")]))


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
    """Train from a recipe, as `fusion fit` does, and score the best checkpoint.

    The command's output goes to the logger "fusion": logging.basicConfig(level=logging.INFO) shows it.

    Args:
        recipe: a name under recipes/ or the path of a YAML file; several are merged, later ones take precedence.
        options: settings by dotted keys, as on the command line: {"trainer.max_epochs": 3, "model.head": "Gated"}.
        train: the manifest: a file, a data frame, an Arrow table or a dict of columns. Paths in a table are relative to the working folder.
        val: a separate table for validation; by default a share of train.
        test: a separate table for testing, likewise.
        runs: folder in which the run folder is created.
        resume: a run folder to resume where it stopped, instead of a recipe.

    Raises UserError for mistakes in recipe, options or data, KeyboardInterrupt if a signal stopped the run (which is saved and can be
    resumed), RuntimeError if another rank was lost.
    """
    recipes = [recipe] if isinstance(recipe, str | os.PathLike) else list(recipe or ())
    words = [f"--recipe={os.fspath(path)}" for path in recipes]
    words += [f"--{name}={as_option(value)}" for name, value in (options or {}).items()]
    if resume is not None:
        if recipes:
            raise UserError("give either a recipe (to start a run) or resume (to continue one), not both")
        words.append(f"--resume={os.fspath(resume)}")
    else:
        words.append(f"--runs={os.fspath(runs)}")
    tables = {"manifest": train, "val_manifest": val, "test_manifest": test}
    tables = {name: table for name, table in tables.items() if table is not None}
    if tables and resume is not None:
        raise UserError("a resumed run keeps its data; leave out train, val and test")
    if tables:
        folder = Path(runs) / run_name(words) / "tables"
        in_memory = any(not isinstance(table, str | os.PathLike) for table in tables.values())
        images = image_columns([*words, "--data.manifest=-", "--data.preparer=null"]) if in_memory else []
        words.append("--data.preparer=null")
        for name, table in tables.items():
            path = os.fspath(table) if isinstance(table, str | os.PathLike) else write_table(table, name, folder, images)
            words.append(f"--data.{name}={path}")
    outcome = train_by(words)
    if outcome.status in (INTERRUPTED, REQUEUE):
        raise KeyboardInterrupt(outcome.message)
    if outcome.status:
        raise RuntimeError(outcome.message)
    assert outcome.folder is not None
    return Run(outcome.folder)


def as_option(value: Any) -> str:
    """A value as on the command line.

    >>> [as_option(value) for value in ("Gated", 3, True, None, {"image": {"until_update": 5}}, [1, 2])]
    ['Gated', '3', 'true', 'null', '{"image": {"until_update": 5}}', '[1, 2]']
    """
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value if isinstance(value, str) else json.dumps(value, default=lambda scalar: scalar.item())  # NumPy's scalars


def image_columns(words: Sequence[str]) -> list[str]:
    """The columns of a manifest that contain images, according to the settings."""
    config = parse_settings(words)[0].config
    inputs = config.data.inputs or {}
    is_image = {name: issubclass(class_of({"class": kind.class_path}, Kind), ImageInput) for name, kind in inputs.items()}
    named = [kind.init_args.column for name, kind in inputs.items() if is_image[name]]
    return [*named, *([] if "image" in inputs else [config.data.columns.image])]


def write_table(table: Any, name: str, folder: Path, images: Sequence[str]) -> str:
    """Write a table in memory to a Parquet file named by its hash; returns the file's path. Relative image paths are made absolute.

    images: the columns that contain images. Raises UserError for anything but a table, and for columns that Parquet can't store.
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
        for column in set(images) & set(table.column_names):
            column_type = table.schema.field(column).type
            cells = [from_working_folder(cell) for cell in table.column(column).to_pylist()]
            array = pa.array(cells) if pa.types.is_dictionary(column_type) else pa.array(cells, column_type)
            table = table.set_column(table.column_names.index(column), column, array)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{name}-{os.getpid()}.parquet"
        pq.write_table(table, temporary)
    except (pa.ArrowException, ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name} can't be written as Parquet: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise UserError(f"can't write the table {name} to {folder}: {error.strerror or error}. Another place: runs=FOLDER") from error
    path = folder / f"{name}-{hashlib.sha256(temporary.read_bytes()).hexdigest()[:12]}.parquet"
    os.replace(temporary, path)
    return str(path)


def from_working_folder(cell: Any) -> Any:
    """An image cell with its paths made absolute; anything but a plain path (a URL, ~) is left to the manifest's reader.

    >>> from_working_folder(["/a.png", None, "~/b.png"]), from_working_folder(b"picture")
    (['/a.png', None, '~/b.png'], b'picture')
    """
    if isinstance(cell, list):
        return [from_working_folder(item) for item in cell]
    if isinstance(cell, dict):
        return cell | {"path": from_working_folder(cell.get("path"))} if "path" in cell else cell
    if not isinstance(cell, str) or not cell or cell.isspace() or cell.startswith("~") or URL.match(cell) or FILE_URL.match(cell):
        return cell
    if cell.lstrip().startswith("["):
        try:
            return json.dumps([from_working_folder(item) for item in json.loads(cell)])
        except (ValueError, TypeError, RecursionError):  # a path that begins with a bracket
            pass
    return os.path.abspath(cell)
