"""Columns of raw samples as Python programs hold them: lists, generators, NumPy arrays, columns of a data frame."""

import os
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from fusion.cell_text import VALUES, cell_text, is_null
from fusion.data.image_paths import bytes_or_path, locate, odd_paths
from fusion.data.images import ImageError
from fusion.data.readers import column_values
from fusion.data.text_file import undecodable
from fusion.errors import UserError

ONE_VALUE = (str, bytes, bytearray, os.PathLike, Image.Image)


def text_column(values: Iterable[Any], name: str = "texts") -> list[str | None]:
    """Texts, None for a missing or blank one; numbers, booleans and times as in a manifest.

    >>> text_column(["red?", " ", None, float("nan"), 3.0, 0.1, "nan"])
    ['red?', None, None, None, '3', '0.1', 'nan']
    """
    texts: list[str | None] = []
    for i, value in enumerate(column(values, name)):
        if not (is_null(value) or isinstance(value, VALUES)):
            raise UserError(f"sample {i}: its text is a {type(value).__name__}; expected a text, a number or None")
        text = cell_text(value)
        if text and not text.isascii() and (flaw := undecodable([("text", text)])):
            raise UserError(f"sample {i}: {flaw}")
        texts.append(text if text and not text.isspace() else None)
    return texts


def image_column(values: Iterable[Any], name: str = "images") -> list[Any]:
    """Images as `decode` takes them, None for a missing one, a tuple for several of one sample; paths are corrected as in a manifest (see
    `locate`), and structs of bytes and path are read as there."""
    return [images_of(value, i) for i, value in enumerate(column(values, name, single_ndim=3))]


def images_of(value: Any, i: int) -> Any:
    """One sample's image; a tuple of several."""
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        value = bytes_or_path(value)
    if not isinstance(value, list | tuple):
        return image(value, i)
    found = tuple(one for one in (images_of(one, i) for one in value) if one is not None)
    return found if len(found) > 1 else found[0] if found else None


def image(value: Any, i: int) -> Any:
    if is_null(value):
        return None
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        return value
    if not odd_paths([value]):
        return Path(value) if value and not value.isspace() else None
    found = locate(str(value))
    if found.missing:
        raise ImageError(f"sample {i}: image missing: {found.missing}")
    return Path(found.path)


def column(values: Iterable[Any], name: str, single_ndim: int = 0) -> list[Any]:
    """The values in order. Raises UserError for one value alone and for what is no column. single_ndim: dimensions of an array of one."""
    if isinstance(values, ONE_VALUE):
        raise UserError(f"{name} is one {type(values).__name__}; expected a list, as {name}=[...]")
    dimensions = getattr(values, "ndim", 1)
    if dimensions not in (1, single_ndim + 1):
        raise UserError(f"{name} is one {type(values).__name__} of {dimensions} dimensions; expected a list or one column, as {name}=[...]")
    if isinstance(values, Mapping | Set) or not isinstance(values, Iterable):
        raise UserError(f"{name} is a {type(values).__name__}; expected a list, an array or a column of a data frame")
    if isinstance(values, pa.Array | pa.ChunkedArray):
        if getattr(values.type, "extension_name", "").startswith("pandas."):  # periods, which are whole numbers there
            raise UserError(f"{name} is an Arrow column of {values.type.extension_name}; expected texts, numbers or times")
        return column_values(name, values if isinstance(values, pa.ChunkedArray) else pa.chunked_array([values]), {})
    if hasattr(values, "to_numpy"):  # a data frame's column, which is indexed by its labels and turns narrow floats into Python's
        values = values.to_numpy()
    return list(values)
