"""Assembles a batch from inputs that were preprocessed one sample at a time: what a preprocessor makes of all of them at once."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Inputs = Any  # of an encoder: Images, Texts or Columns, of tensors or of arrays

WIDE = ("ids", "image_mask")  # fields whose second dimension differs between samples


class Row(NamedTuple):
    """One preprocessed sample. inputs: by name, each a batch of one. length: number of tokens, and of images beyond the first; a batch
    is padded to the longest of its samples."""

    inputs: Mapping[str, Inputs]
    length: int


def row_of(inputs: Mapping[str, Inputs]) -> Row:
    """A sample's row, from a batch of one."""
    wide = (getattr(one, field, None) for one in inputs.values() for field in WIDE)
    return Row(inputs, sum(int(array.shape[1]) for array in wide if array is not None))


def stacked(rows: Sequence[Inputs], pad_id: int = 0) -> Inputs:
    """The encoder's input of several samples, from one batch of one for each. pad_id: the token after the end of shorter texts."""
    kind = type(rows[0])
    tensors = next(value for value in rows[0] if hasattr(value, "shape"))
    if len(rows) == 1:
        return rows[0]
    if hasattr(rows[0], "pixels"):
        arrays = images(rows)
    elif hasattr(rows[0], "ids"):
        arrays = texts(rows, pad_id)
    else:
        arrays = {name: np.concatenate([as_array(getattr(row, name)) for row in rows]) for name in ("numbers", "categories", "mask")}
        arrays["full"] = bool(arrays["mask"].all())
    return kind(**{name: like(tensors, value) for name, value in arrays.items()})


def images(rows: Sequence[Inputs]) -> dict[str, Any]:
    pixels, present = (np.concatenate([as_array(getattr(row, name)) for row in rows]) for name in ("pixels", "present"))
    arrays = {"pixels": pixels, "present": present, "any_present": bool(present.any()), "all_present": bool(present.all())}
    if all(row.image_mask is None for row in rows):
        return arrays
    # Some samples have several images: the numbers of each among all pixels.
    counts = [len(row.pixels) for row in rows]
    index = np.zeros((len(rows), max(counts)), dtype=np.int64)
    mask = np.zeros(index.shape, dtype=bool)
    for i, (row, count, start) in enumerate(zip(rows, counts, np.cumsum([0, *counts]), strict=False)):
        index[i, :count] = start + np.arange(count)
        mask[i, :count] = as_array(row.present)[0] if row.image_mask is None else as_array(row.image_mask)[0]
    return arrays | {"image_index": index, "image_mask": mask, "all_present": bool(mask.all())}


def texts(rows: Sequence[Inputs], pad_id: int) -> dict[str, Any]:
    longest = max(int(row.ids.shape[1]) for row in rows)
    ids = np.full((len(rows), longest), pad_id, dtype=np.int64)
    mask = np.zeros(ids.shape, dtype=bool)
    for i, row in enumerate(rows):
        own = as_array(row.ids)
        ids[i, : own.shape[1]] = own[0]
        mask[i, : own.shape[1]] = as_array(row.mask)[0]
    return {"ids": ids, "mask": mask, "full": bool(mask.all())}


def as_array(value: Any) -> np.ndarray:
    return value if isinstance(value, np.ndarray) else value.numpy()


def like(example: Any, value: Any) -> Any:
    """An array as a tensor if the example is one, so that torch is imported only where a model has done so."""
    return value if isinstance(example, np.ndarray) or not isinstance(value, np.ndarray) else sys.modules["torch"].from_numpy(value)
