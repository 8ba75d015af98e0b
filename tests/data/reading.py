"""What the tests of manifests share: a file written, and read with its issues and notes."""

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion.data import FusionData
from fusion.data.format import Format
from fusion.data.issues import DataIssues
from fusion.data.kinds import Kind
from fusion.data.table import Columns, Table, read_table
from fusion.tasks import Classification


def written(folder: Path, content: str | bytes, name: str = "m.csv", *, encoding: str = "utf-8", compressed: bool = False) -> Path:
    path = folder / name
    raw = content if isinstance(content, bytes) else content.encode(encoding)
    path.write_bytes(gzip.compress(raw) if compressed else raw)
    return path


def read_all(
    path: Path, modalities: tuple[str, ...] = ("text",), *, columns: Columns | None = None, need_label: bool = True, **format: Any
) -> tuple[Table, list[tuple[int | None, str]], list[str]]:
    """The table, (row, reason) of each sample that was dropped, and the notes."""
    issues = DataIssues("drop")
    columns, task = columns or Columns(), Classification() if need_label else None
    table = read_table(path, columns, usual_inputs(columns, modalities), task=task, issues=issues, format=Format(**format))
    return table, [(issue.row, issue.reason) for issue in issues.dropped], issues.notes


def usual_inputs(columns: Columns, names: Sequence[str]) -> dict[str, Kind]:
    """The inputs of these names, of an image and a text, as data makes them."""
    return FusionData(manifest="none", columns=columns).kinds(names)
