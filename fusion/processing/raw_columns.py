"""Columns of raw values from Python: lists, generators, NumPy arrays, columns of a data frame."""

import os
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from PIL import Image

from fusion.cell_text import VALUES, cell_text, is_null
from fusion.errors import UserError
from fusion.processing.image_paths import bytes_or_path, locate, odd_paths
from fusion.processing.images import ImageError
from fusion.processing.undecodable import flaw_of_text

ONE_VALUE = (str, bytes, bytearray, os.PathLike, Image.Image)


def text_column(values: Iterable[Any], name: str = "texts") -> list[str | None]:
    """Texts, None for a missing or blank one; numbers, booleans and times are converted as in a manifest.

    >>> text_column(["red?", " ", None, float("nan"), 3.0, 0.1, "nan"])
    ['red?', None, None, None, '3', '0.1', 'nan']
    """
    texts: list[str | None] = []
    for i, value in enumerate(column(values, name)):
        if not (is_null(value) or isinstance(value, VALUES)):
            raise UserError(f"sample {i}: its text is a {type(value).__name__}; expected a text, a number or None")
        text = cell_text(value)
        if text and not text.isascii() and (flaw := flaw_of_text([("text", text)])):
            raise UserError(f"sample {i}: {flaw}")
        texts.append(text if text and not text.isspace() else None)
    return texts


def image_column(values: Iterable[Any], name: str = "images") -> list[Any]:
    """Images as `decode` accepts them, None for a missing one, a tuple for several of one sample. As in a manifest, oddly written paths are
    corrected (see `locate`), and structs of bytes and path are read."""
    return [images_of(value, i) for i, value in enumerate(column(values, name, single_ndim=3))]


def images_of(value: Any, i: int) -> Any:
    """One sample's image, or a tuple of its images."""
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        value = bytes_or_path(value)
    if not isinstance(value, list | tuple):
        return image(value, i)
    images = tuple(one for one in (images_of(one, i) for one in value) if one is not None)
    return images if len(images) > 1 else images[0] if images else None


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
    located = locate(str(value))
    if located.missing:
        raise ImageError(f"sample {i}: image missing: {located.missing}")
    return Path(located.path)


def column(values: Iterable[Any], name: str, single_ndim: int = 0) -> list[Any]:
    """The values as a list. Raises UserError for a single value and for what is not a column. single_ndim: dimensions of a single value
    that is an array."""
    if isinstance(values, ONE_VALUE):
        raise UserError(f"{name} is one {type(values).__name__}; expected a list, as {name}=[...]")
    dimensions = getattr(values, "ndim", 1)
    if dimensions not in (1, single_ndim + 1):
        raise UserError(f"{name} is one {type(values).__name__} of {dimensions} dimensions; expected a list or one column, as {name}=[...]")
    if isinstance(values, Mapping | Set) or not isinstance(values, Iterable):
        raise UserError(f"{name} is a {type(values).__name__}; expected a list, an array or a column of a data frame")
    if type(values).__module__.startswith("pyarrow."):
        import pyarrow as pa  # installed where somebody has such a column

        from fusion.processing.arrow import column_values

        if isinstance(values, pa.Array | pa.ChunkedArray):
            if getattr(values.type, "extension_name", "").startswith("pandas."):  # periods, which Arrow stores as integers
                raise UserError(f"{name} is an Arrow column of {values.type.extension_name}; expected texts, numbers or times")
            return column_values(name, values if isinstance(values, pa.ChunkedArray) else pa.chunked_array([values]), {})
    if hasattr(values, "to_numpy"):  # iterating over a data frame's column would turn narrow floats into Python's
        integers = getattr(getattr(values, "dtype", None), "kind", "") in ("i", "u")  # with missing ones, they would become floats
        values = values.to_numpy(dtype=object) if integers else values.to_numpy()
    return list(values)
