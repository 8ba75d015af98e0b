"""Every distinct image is opened before training starts: the damaged are known by name, and a small set is kept decoded."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock
from torch import Tensor

from fusion.data.images import ImageError
from fusion.data.processor import ImageSpec
from fusion.data.samples import load_image


def check_images(paths: Sequence[str], spec: ImageSpec, *, memory_gib: float, cache: Path) -> tuple[Tensor | None, dict[str, str]]:
    """Decode every image once.

    Gives their pixels, uint8 (U, 3, H, W), if they fit into `memory_gib`, else None; and for each bad one, path -> reason.

    What was found of images too many for memory is remembered in `cache`, by path, size and time of change, so that the next
    run (and the other processes of this one) need not decode them again.
    """
    fits = len(paths) * 3 * spec.size[0] * spec.size[1] <= memory_gib * 2**30
    if not fits:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / "checked.lock"):
            return None, check_remembering(paths, spec, cache / "checked.parquet")
    pixels = torch.zeros(len(paths), 3, *spec.size, dtype=torch.uint8)

    def keep(row: int) -> str:
        try:
            pixels[row] = torch.from_numpy(load_image(paths[row], spec))
        except ImageError as error:
            return str(error)
        return ""

    return pixels, {path: reason for path, reason in zip(paths, in_threads(keep, range(len(paths))), strict=True) if reason}


def check_remembering(paths: Sequence[str], spec: ImageSpec, memory: Path) -> dict[str, str]:
    known: dict[tuple[str, int, int], str] = {}
    if memory.is_file():
        table = pq.read_table(memory).to_pydict()
        known = dict(zip(zip(table["path"], table["size"], table["changed"], strict=True), table["reason"], strict=True))
    stamps = {path: stamp(path) for path in paths}

    def reason_of(path: str) -> str:
        try:
            load_image(path, spec)
        except ImageError as error:
            return str(error)
        return ""

    unseen = [path for path in paths if stamps[path] not in known]
    if unseen:
        known |= dict(zip((stamps[path] for path in unseen), in_threads(reason_of, unseen), strict=True))
        columns = list(zip(*known, strict=True))
        written = memory.with_suffix(".tmp")
        pq.write_table(pa.table({"path": columns[0], "size": columns[1], "changed": columns[2], "reason": list(known.values())}), written)
        os.replace(written, memory)
    return {path: known[stamps[path]] for path in paths if known[stamps[path]]}


def stamp(path: str) -> tuple[str, int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return (path, -1, -1)
    return (path, status.st_size, status.st_mtime_ns)


def in_threads(function: Callable[[Any], str], items: Sequence[Any]) -> list[str]:
    """`function` of each item, in order; Pillow decodes outside the interpreter's lock."""
    with ThreadPoolExecutor(max_workers=min(32, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items, chunksize=16))
