"""Every distinct image is opened before training starts: the unreadable are known by name, and a small set is kept decoded."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import PIL
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock
from PIL import features
from torch import Tensor

from fusion.console import SignOfLife, print_rank_zero
from fusion.data.images import ImageError, cores
from fusion.data.processor import ImageSpec
from fusion.data.samples import load_image
from fusion.errors import UserError

VERSION = 2  # of what `images` accepts: raise it when the same file would get another verdict


class Checked(NamedTuple):
    """What was found of images. pixels: uint8 (U, 3, H, W), None where they are too many for memory. bad: path -> reason. digests: path ->
    a digest of the file's bytes, for every good one."""

    pixels: Tensor | None
    bad: dict[str, str]
    digests: dict[str, str]


def check_images(paths: Sequence[str], spec: ImageSpec, *, memory_gib: float, cache: Path) -> Checked:
    """Decode every image once. The pixels are kept if they fit into `memory_gib`.

    What was found of images too many for memory is remembered in `cache`, by path, size and time of change of the file, and by all that
    decides the verdict beside it, so that the next run (and the other processes of this one) need not decode them again.
    """
    fits = len(paths) * 3 * spec.size[0] * spec.size[1] <= memory_gib * 2**30
    if fits:
        pixels = torch.zeros(len(paths), 3, *spec.size, dtype=torch.uint8)
        found = in_threads(lambda row: verdict(paths[row], spec, pixels[row]), range(len(paths)))
        verdicts = dict(zip(paths, found, strict=True))
    else:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / "checked.lock"):
                verdicts = check_remembering(paths, spec, cache / f"checked-{decided_by(spec)}.parquet")
        except OSError as error:
            raise UserError(f"can't write to {cache}: {error.strerror or error}. Another place: --data.cache=FOLDER") from error
    bad = {path: reason for path, (reason, _) in verdicts.items() if reason}
    digests = {path: digest for path, (reason, digest) in verdicts.items() if not reason}
    return Checked(pixels if fits else None, bad, digests)


Verdict = tuple[str, str]  # the reason why an image can't be used, "" if it can; the digest of its file, "" if it can't


def verdict(path: str, spec: ImageSpec, keep: Tensor | None = None) -> Verdict:
    try:
        pixels = load_image(path, spec)
        if keep is not None:
            keep.copy_(torch.from_numpy(pixels))
        return "", digest_of(path)
    except ImageError as error:
        return str(error), ""


def digest_of(path: str) -> str:
    """A digest of a file's bytes. Raises ImageError where it can't be read any more."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=12)).hexdigest()
    except OSError as error:
        raise ImageError(error.strerror or str(error)) from error


def decided_by(spec: ImageSpec) -> str:
    """A digest of all that decides whether a file is good, beside the file: limits and size, and the libraries that decode."""
    libraries = {name: features.version(name) for name in sorted(features.get_supported())}
    key = json.dumps([VERSION, asdict(spec), PIL.__version__, libraries], default=str)
    return hashlib.sha256(key.encode()).hexdigest()[:12]


def check_remembering(paths: Sequence[str], spec: ImageSpec, memory: Path) -> dict[str, Verdict]:
    known = remembered(memory)
    stamps = {path: stamp(path) for path in paths}
    unseen = [path for path in paths if stamps[path] not in known]
    if unseen:
        found = in_threads(lambda path: verdict(path, spec), unseen)
        known |= dict(zip((stamps[path] for path in unseen), found, strict=True))
        stamped, verdicts = zip(*known, strict=True), zip(*known.values(), strict=True)
        columns = dict(zip(("path", "size", "changed", "reason", "digest"), [*stamped, *verdicts], strict=True))
        written = memory.with_suffix(".tmp")
        pq.write_table(pa.table(columns), written)
        os.replace(written, memory)
    return {path: known[stamps[path]] for path in paths}


def remembered(memory: Path) -> dict[tuple[str, int, int], Verdict]:
    """Verdicts by stamp; none where the file is not there, or is corrupt: the images are then decoded again."""
    try:
        t = pq.read_table(memory).to_pydict()
        stamped = zip(t["path"], t["size"], t["changed"], strict=True)
        return dict(zip(stamped, zip(t["reason"], t["digest"], strict=True), strict=True))
    except (FileNotFoundError, pa.ArrowException, KeyError):
        return {}


def stamp(path: str) -> tuple[str, int, int]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # the latter for a NUL in the path
        return (path, -1, -1)
    return (path, status.st_size, status.st_mtime_ns)


def in_threads(function: Callable[[Any], Verdict], items: Sequence[Any]) -> list[Verdict]:
    """`function` of each item, in order; Pillow decodes outside the interpreter's lock. Prints how far it is from time to time."""
    found: list[Verdict] = []
    sign = SignOfLife()
    with ThreadPoolExecutor(max_workers=min(32, cores())) as pool:
        for result in pool.map(function, items, chunksize=16):
            found.append(result)
            if sign.due():
                print_rank_zero(f"checked {len(found):,} of {len(items):,} images")
    return found
