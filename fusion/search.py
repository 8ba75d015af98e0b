"""Search with a retrieval run: an index of a manifest's embeddings, and the nearest items of a query."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fusion.data.issues import DataIssues
from fusion.data.kinds import TextInput
from fusion.data.table import Table
from fusion.errors import UserError
from fusion.predictor import Predictor, model_of
from fusion.processing.answers import embeddings
from fusion.runs.bundle import WEIGHTS
from fusion.scoring import load_for, predict_rows, reject_unmatched, rows_of
from fusion.settings.reading import inputs_for, reading_of
from fusion.tasks import Retrieval

FORMAT = 1
ABOUT, EMBEDDINGS = "index.json", "embeddings.safetensors"
SIDES = ("left", "right")
CHUNK_VALUES = 2**24  # scores computed at once


class Match(NamedTuple):
    """An item found: its cosine similarity with the query, its row and id in the manifest, its cells by input; and the probability that it
    matches, if it was re-ranked."""

    score: float
    row: int
    id: str
    cells: dict[str, str]
    match: float | None = None


class Index:
    """The embeddings of a manifest's distinct items, for exact search.

    embeddings: by side, (n, dim) float32 of unit length. items: by side, a table of their rows, ids and cells.
    """

    def __init__(self, predictor: Predictor, embeddings: dict[str, np.ndarray], items: dict[str, pa.Table], model: str) -> None:
        self.predictor, self.embeddings, self.items, self.model = predictor, embeddings, items, model

    def __len__(self) -> int:
        return sum(map(len, self.embeddings.values()))

    @classmethod
    def build(
        cls,
        run: str | Path,
        manifest: str | os.PathLike[str],
        *,
        checkpoint: str = "best",
        batch_size: int = 256,
        reading: Sequence[str] = (),
        issues: DataIssues | None = None,
    ) -> "Index":
        """Embed a manifest's images, texts or whatever the run pairs; a row may have one side alone. Unreadable rows go to `issues`.

        Args:
            run: folder of a run of the task Retrieval.
            manifest: the file.
            checkpoint: best or last.
            batch_size: rows embedded at a time.
            reading: options of fit that describe the manifest.
            issues: collects the rows that are left out.

        Raises UserError for a run of another task, and for a manifest without a usable row.
        """
        folder = Path(run).expanduser()
        issues = DataIssues("drop") if issues is None else issues
        predictor = load_for(folder, checkpoint, issues)
        retrieval_task(predictor)  # rejects other tasks before anything is read
        columns, format = reading_of(folder, reading)
        table = rows_of(os.fspath(manifest), columns, format, inputs_for(predictor, columns, folder), issues, None)
        table, outputs = predict_rows(predictor, table, issues, batch_size)
        sides = dict(zip(SIDES, embeddings_of(predictor, outputs), strict=True))
        embeddings, items = {}, {}
        for side, all_rows in sides.items():
            names = names_of(predictor, side)
            rows = first_rows(table, names, np.flatnonzero(np.abs(all_rows).sum(axis=1)))
            embeddings[side], items[side] = all_rows[rows], item_table(table, names, rows)
        return cls(predictor, embeddings, items, digest_of(folder, checkpoint))

    def save(self, folder: str | Path) -> None:
        """Write the index; an earlier one is replaced, once the new one is complete. Raises UserError where it can't be written, and for a
        folder that holds anything else."""
        path = free_or_index(folder)
        temporary, earlier = (path.with_name(f".{path.name}-{what}-{os.getpid()}") for what in ("new", "old"))
        try:
            temporary.mkdir(parents=True)
            save_file({side: np.ascontiguousarray(rows) for side, rows in self.embeddings.items()}, temporary / EMBEDDINGS)
            for side, table in self.items.items():
                pq.write_table(table, temporary / f"{side}.parquet")
            (temporary / ABOUT).write_text(json.dumps({"format": FORMAT, "model": self.model}) + "\n", encoding="utf-8")
            if path.exists():
                os.replace(path, earlier)
            os.replace(temporary, path)
            shutil.rmtree(earlier, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(f"can't write the index {path} ({error})") from error

    @classmethod
    def load(cls, folder: str | Path, run: str | Path, *, checkpoint: str = "best") -> "Index":
        """Raises UserError for a missing or unreadable index, and for one of another model."""
        path = Path(folder).expanduser()
        try:
            about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
            embeddings = load_file(path / EMBEDDINGS)
            items = {side: pq.read_table(path / f"{side}.parquet") for side in SIDES}
        except FileNotFoundError as error:
            raise UserError(f"there is no index {path}; make it by: fusion index --run {run} --manifest FILE") from error
        except (OSError, ValueError, SafetensorError, pa.ArrowException) as error:
            raise UserError(f"can't read the index {path} ({str(error).splitlines()[0]}); make it again by fusion index") from error
        if about.get("format") != FORMAT or about.get("model") != digest_of(Path(run).expanduser(), checkpoint):
            raise UserError(
                f"the index {path} was made by another model or version; make it again: fusion index --run {run} --manifest FILE"
            )
        return cls(load_for(Path(run).expanduser(), checkpoint, DataIssues("drop")), embeddings, items, about["model"])

    def search(
        self, images: Iterable[Any] | None = None, texts: Iterable[Any] | None = None, *, k: int = 10, rerank: int = 0, **inputs: Any
    ) -> list[list[Match]]:
        """The nearest items of the other side for each query, best first.

        Args:
            images: queries, as for `Predictor.predict`; all queries are of one side.
            texts: likewise.
            k: number of items for each query.
            rerank: number of nearest items that the run's matcher orders anew, of which the first k are returned; 0 for none.
            inputs: other inputs by name.

        Raises UserError for queries of both sides, and where the other side has no item.
        """
        if k < 1:
            raise UserError(f"k is {k}; expected at least 1")
        outputs = self.predictor.outputs(images, texts, **inputs)
        sides = dict(zip(SIDES, embeddings_of(self.predictor, outputs), strict=True))
        given = [side for side, rows in sides.items() if np.abs(rows).sum()]
        if len(given) > 1:
            both = " and ".join("+".join(names_of(self.predictor, side)) for side in SIDES)
            raise UserError(f"a query is of one side, but both {both} are given; leave out one of them")
        other = SIDES[1 - SIDES.index(given[0])]
        if not len(self.embeddings[other]):
            raise UserError(f"the index has no {'+'.join(names_of(self.predictor, other))} to be found")
        if rerank:
            reject_unmatched(self.predictor)
        found = self.matches(other, *nearest_rows(sides[given[0]], self.embeddings[other], max(k, rerank)))
        if not rerank:
            return found
        named = {"image": images, "text": texts} | inputs
        kinds = self.predictor.processor.inputs
        queries = {name: kinds[name].raw(named[name], name) for name in self.inputs_of(given[0]) if named.get(name) is not None}
        return [
            self.reranked({name: cells[i] for name, cells in queries.items()}, of_query, rerank)[:k] for i, of_query in enumerate(found)
        ]

    def reranked(self, query: dict[str, Any], found: list[Match], first: int) -> list[Match]:
        """The items with the first ones in the order of the matcher."""
        columns: dict[str, list[Any]] = {name: [query.get(name)] * min(first, len(found)) for name in self.predictor.modalities}
        for name in found[0].cells:
            is_text = isinstance(self.predictor.processor.inputs[name], TextInput)
            columns[name] = [match.cells[name] if is_text else cell_of_text(match.cells[name]) for match in found[:first]]
        probability = self.predictor.match(columns).sigmoid().tolist()
        matched = [match._replace(match=p) for match, p in zip(found[:first], probability, strict=True)]
        return [*sorted(matched, key=lambda match: -(match.match or 0.0)), *found[first:]]

    def inputs_of(self, side: str) -> list[str]:
        """The names of a side's inputs."""
        return names_of(self.predictor, side)

    def matches(self, side: str, rows: np.ndarray, scores: np.ndarray) -> list[list[Match]]:
        found = []
        for of_query, of_scores in zip(rows, scores, strict=True):
            records = self.items[side].take(pa.array(of_query)).to_pylist()
            cells = [{name: cell for name, cell in one.items() if name not in ("row", "id")} for one in records]
            found.append([Match(float(s), one["row"], one["id"], c) for s, one, c in zip(of_scores, records, cells, strict=True)])
        return found


def free_or_index(folder: str | Path) -> Path:
    """The absolute path of a folder for an index. Raises UserError for one that holds anything but an index."""
    path = Path(folder).expanduser().resolve()
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not (path / ABOUT).is_file()):
        raise UserError(f"{path} holds something else than an index, which would be lost; expected a new folder, or that of an index")
    return path


def nearest_rows(queries: np.ndarray, embeddings: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (Q, k) of the embeddings (n, D) with the highest inner products with queries (Q, D), best first, and these products; fewer
    than k where n is smaller.

    >>> rows, scores = nearest_rows(np.eye(2, dtype=np.float32), np.array([[0.0, 1.0], [1.0, 0.0], [0.6, 0.8]], dtype=np.float32), 2)
    >>> rows.tolist(), (10 * scores).round().astype(int).tolist()
    ([[1, 2], [0, 2]], [[10, 6], [10, 8]])
    """
    k = min(k, len(embeddings))
    step = max(1, CHUNK_VALUES // max(1, len(embeddings)))
    rows, scores = [], []
    for start in range(0, len(queries), step):
        products = queries[start : start + step] @ embeddings.T
        best = np.argpartition(-products, k - 1, axis=1)[:, :k]
        of_best = np.take_along_axis(products, best, axis=1)
        order = np.argsort(-of_best, axis=1, kind="stable")
        rows.append(np.take_along_axis(best, order, axis=1))
        scores.append(np.take_along_axis(of_best, order, axis=1))
    return np.concatenate(rows), np.concatenate(scores)


def retrieval_task(predictor: Predictor) -> Retrieval:
    task = predictor.processor.task
    if not isinstance(task, Retrieval):
        raise UserError(f"only runs of the task Retrieval can be searched; this one is of {type(task).__name__}")
    return task


def embeddings_of(predictor: Predictor, outputs: Sequence[tuple[Any, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Left and right embeddings of all samples of a predictor's outputs."""
    retrieval_task(predictor)
    return embeddings(np.concatenate([values for values, _ in outputs]))


def names_of(predictor: Predictor, side: str) -> list[str]:
    """The inputs of a side."""
    head: Any = predictor.model.head
    return head.sides[side]


def first_rows(table: Table, names: Sequence[str], rows: np.ndarray) -> np.ndarray:
    """Of these rows, the first with each distinct item of the inputs of these names."""
    first: dict[Any, int] = {}
    for row in rows.tolist():
        first.setdefault(tuple(table.kinds[name].identity(table.inputs[name][row]) for name in names), row)
    return np.array(list(first.values()), dtype=np.int64)


def item_table(table: Table, names: Sequence[str], rows: np.ndarray) -> pa.Table:
    """Rows and ids of items in the manifest, and their cells as text."""
    columns: dict[str, Any] = {"row": [int(table.rows[i]) for i in rows], "id": [str(table.ids[i]) for i in rows]}
    columns |= {name: [cell_as_text(table.inputs[name][i]) for i in rows] for name in names}
    schema = pa.schema([("row", pa.int64()), ("id", pa.string()), *((name, pa.string()) for name in names)])
    return pa.table(columns, schema=schema)


def cell_as_text(cell: Any) -> str | None:
    """
    >>> cell_as_text("a.png"), cell_as_text(b"123"), cell_as_text(("a.png", "b.png"))
    ('a.png', '3 bytes', '["a.png", "b.png"]')
    """
    if isinstance(cell, bytes):
        return f"{len(cell)} bytes"
    return json.dumps([cell_as_text(one) for one in cell]) if isinstance(cell, tuple) else cell if cell is None else str(cell)


def cell_of_text(text: str | None) -> Any:
    """The cell whose text `cell_as_text` gave. Raises UserError for bytes.

    >>> cell_of_text("a.png"), cell_of_text('["a.png", "b.png"]')
    ('a.png', ('a.png', 'b.png'))
    """
    if text is not None and re.fullmatch(r"\d+ bytes", text):
        raise UserError(
            "the index doesn't keep images that were bytes in a Parquet file, so that they can't be re-ranked; index image files"
        )
    if text is not None and text.startswith("["):
        with suppress(ValueError):
            cells = json.loads(text)
            return tuple(cells) if isinstance(cells, list) else text
    return text


def digest_of(run: Path, checkpoint: str) -> str:
    """The digest of a run's weights."""
    path, _ = model_of(run, checkpoint)
    with open(path / WEIGHTS if path.is_dir() else path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
