"""Readers of manifests: CSV, TSV, JSON Lines and Parquet, chosen by the file's name."""

import json
import os
import zlib
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fusion.data.cells import Cells, RawColumn
from fusion.data.column import TEXT, Column
from fusion.data.format import Format
from fusion.data.separated import read_separated
from fusion.data.text_file import BYTE_ORDER_MARK, may_be_utf8, open_text, undecodable
from fusion.errors import UserError, nearest
from fusion.processing.arrow import column_values


def read_cells(path: str, format: Format, rich: Collection[str] = ()) -> Cells:
    """The cells of a file; in the `rich` columns they may be bytes, structs of bytes and path, or lists. Raises UserError for a file that
    can't be read or has no rows."""
    folder, name = os.path.split(os.path.abspath(path))
    expected = f"expected {', '.join(READERS)}"
    if not os.path.exists(path):
        if not os.path.isdir(folder):
            raise UserError(f"there is no manifest {path}: there is no folder {folder}")
        raise UserError(f"there is no manifest {path}. In its folder: {nearest(name, os.listdir(folder))}")
    if os.path.isdir(path):
        raise UserError(f"the manifest {path} is a folder, {expected} file")
    lowered = name.lower()
    suffix = os.path.splitext(lowered.removesuffix(".gz"))[1]
    if suffix not in READERS:
        raise UserError(f"the manifest {path} is a {suffix or 'nameless'} file, {expected} (all but the last also as .gz)")
    if suffix == ".parquet" and lowered.endswith(".gz"):
        raise UserError(f"the manifest {path} is compressed twice, since Parquet compresses its columns itself: unpack it by gunzip")
    try:
        cells = read_parquet(path, format, rich) if suffix == ".parquet" else READERS[suffix](path, format)
        if suffix != ".parquet" and not format.is_utf8 and may_be_utf8(path):
            cells.notes.append(f"{path} is read as {format.encoding}, but is valid UTF-8; to read it as such: --data.format.encoding=utf-8")
    except UnicodeError as error:
        raise UserError(f"the manifest {path} is not {format.encoding}: {error}. Another encoding: --data.format.encoding=NAME") from error
    except (EOFError, zlib.error) as error:
        raise UserError(f"the manifest {path} is a truncated or corrupt gzip file ({error})") from error
    except OSError as error:
        raise UserError(f"can't read the manifest {path}: {error.strerror or ' '.join(str(error).split())}") from error
    if not cells.rows and not cells.malformed:
        raise UserError(f"the manifest {path} has no rows")
    return cells


def read_jsonl(path: str, format: Format) -> Cells:
    """One JSON object per line; a key that is missing in a line is null there."""
    cells, rows, columns = Cells(), list[int](), dict[str, list[Any]]()
    with open_text(path, format, newline="\n") as file:
        for line, text in enumerate(file, 1):
            if text.startswith(BYTE_ORDER_MARK):  # the decoder removes the file's first one; concatenated files have more
                text = text.removeprefix(BYTE_ORDER_MARK)
            if not text or text.isspace():
                continue
            if text[0] == "[" and not rows and not cells.malformed:
                raise UserError(f"the manifest {path} is a JSON array; expected one object per line, as by pandas' to_json(lines=True)")
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                cells.malformed.append((line, f"not JSON ({error.msg} at character {error.colno})"))
                continue
            except (ValueError, RecursionError) as error:  # a number of thousands of digits; deeply nested brackets
                cells.malformed.append((line, f"unreadable JSON ({error})"))
                continue
            if not isinstance(row, dict):
                cells.malformed.append((line, "not a JSON object"))
                continue
            # Undecodable bytes became lone surrogates, by which their column is found.
            if not text.isascii() or "\\u" in text:
                flaw = undecodable(((name, cell) for name, cell in row.items() if isinstance(cell, str)), format)
                if flaw:
                    cells.flawed[len(rows)] = flaw
            for name in row.keys() - columns.keys():
                columns[name] = [None] * len(rows)
            for name, column in columns.items():
                column.append(row.get(name))
            rows.append(line)
    cells.columns, cells.rows = dict(columns), rows
    if cells.malformed and not rows:
        line, reason = cells.malformed[0]
        raise UserError(f"the manifest {path} has no line that is a JSON object; the first: row {line}: {reason}")
    return cells


def read_parquet(path: str, format: Format, rich: Collection[str] = ()) -> Cells:
    """Columns of text, numbers, booleans, times and categories; lists, structs and bytes are read only in the `rich` columns. `format` is
    not used."""
    try:
        # Not pq.read_table, which would add columns for the folders' names (label=3/part.parquet).
        with pq.ParquetFile(path) as file:
            kinds = dict(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True))
            opaque = {name: str(kind) for name, kind in kinds.items() if pa.types.is_nested(kind) or "binary" in str(kind)}
            opaque = {name: kind for name, kind in opaque.items() if name not in rich or not is_rich(kinds[name])}
            for field in file.schema_arrow:  # Arrow stores pandas' periods as integers, counted from 1970
                extension = (field.metadata or {}).get(b"ARROW:extension:name", b"").decode() or getattr(field.type, "extension_name", "")
                if extension.startswith("pandas."):
                    opaque[field.name] = extension
            table = file.read(columns=[name for name in kinds if name not in opaque])
    except pa.ArrowException as error:
        raise UserError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from error
    cells = Cells(rows=range(1, len(table) + 1), opaque=opaque)
    for name, column in zip(table.column_names, table.columns, strict=True):
        cells.columns[name] = column_cells(name, column, cells.flawed)
    return cells


def column_cells(name: str, column: pa.ChunkedArray, flawed: dict[int, str]) -> RawColumn:
    """A column of valid text as a `Column`; any other as a list of Python values."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if is_text(column.type):
        texts = column.cast(TEXT).combine_chunks()
        with suppress(pa.ArrowInvalid):
            texts.validate(full=True)
            return Column(texts)
    return column_values(name, column, flawed)


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_rich(kind: pa.DataType) -> bool:
    """Whether a column holds (lists of) bytes, texts, numbers or structs of bytes and path: one or several images or texts."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):
        return {kind.field(i).name for i in range(kind.num_fields)} <= {"bytes", "path"}
    return not pa.types.is_nested(kind)


READERS: Mapping[str, Callable[[str, Format], Cells]] = {
    ".csv": partial(read_separated, separator=","),
    ".tsv": partial(read_separated, separator="\t"),
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".parquet": read_parquet,
}
