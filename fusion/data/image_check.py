"""Every distinct image is opened before training starts: the unreadable are known by name, and a small set is kept decoded."""

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from math import prod
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
from fusion.data.images import FileOrBytes, ImageError, ImageSpec, cores, load_image
from fusion.errors import UserError

VERSION = 2  # of what `images` accepts: raise it when the same file would get another verdict
A_DAY_S = 86_400

Verdict = tuple[str, str]  # the reason why an image can't be used, "" if it can; the digest of its file, "" if it can't
Stamp = tuple[str, int, int]  # a file's path, size and time of change in ns; -1 where there is none


class Checked(NamedTuple):
    """What was found of images. pixels: uint8 (U, 3, H, W), None where they are too many for memory. bad: path (or bytes) -> reason.
    digests: of the bytes of every good one."""

    pixels: Tensor | None
    bad: dict[FileOrBytes, str]
    digests: dict[FileOrBytes, str]


def check_images(paths: Sequence[FileOrBytes], spec: ImageSpec, *, memory_gib: float, cache: Path, shared: bool = False) -> Checked:
    """Decode every image once. The pixels are kept if they fit into `memory_gib`.

    shared: other processes of this machine do the same: the first decodes, and all map one file of pixels in `cache` into their memory,
    which the system holds once. It may be removed (`shared_file`) as soon as all have it.

    What was found of images too many for memory, or shared, is remembered in `cache`, by path, size and time of change of the file, and by
    all that decides the verdict beside it, so that the next run (and the other processes of this one) need not decode them again.
    """
    fits = len(paths) * 3 * spec.size[0] * spec.size[1] <= memory_gib * 2**30
    pixels: Tensor | None = None
    if fits and not (shared and paths):
        pixels = kept = torch.zeros(len(paths), 3, *spec.size, dtype=torch.uint8)
        verdicts = dict(zip(paths, in_threads(lambda row: verdict(paths[row], spec, kept[row]), range(len(paths))), strict=True))
    else:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / "checked.lock"):
                memory = cache / f"checked-{decided_by(spec)}.parquet"
                verdicts, pixels = check_shared(paths, spec, memory) if fits else (check_remembering(paths, spec, memory), None)
        except OSError as error:
            raise UserError(f"can't write to {cache}: {error.strerror or error}. Another place: --data.cache=FOLDER") from error
    bad = {path: reason for path, (reason, _) in verdicts.items() if reason}
    digests = {path: digest for path, (reason, digest) in verdicts.items() if not reason}
    return Checked(pixels, bad, digests)


def check_shared(paths: Sequence[FileOrBytes], spec: ImageSpec, memory: Path) -> tuple[dict[FileOrBytes, Verdict], Tensor]:
    """Verdicts; and the pixels (U, 3, H, W), mapped from a file which the first process makes. What is written to them stays its own."""
    file = shared_file(paths, spec, memory.parent)
    if not file.is_file():
        for older in memory.parent.glob(f"pixels-{platform.node()}-*"):  # of runs that were killed
            if time.time() - older.stat().st_mtime > A_DAY_S:
                older.unlink(missing_ok=True)
        shape, written = (len(paths), 3, *spec.size), file.with_suffix(".tmp")
        with open(written, "wb") as room:  # a full disk is reported now, and not by a signal while pixels are written
            os.posix_fallocate(room.fileno(), 0, prod(shape)) if hasattr(os, "posix_fallocate") else room.truncate(prod(shape))
        decoded = torch.from_file(str(written), shared=True, size=prod(shape), dtype=torch.uint8).view(shape)
        remember(paths, in_threads(lambda row: verdict(paths[row], spec, decoded[row]), range(len(paths))), memory)
        os.replace(written, file)
    pixels = torch.from_file(str(file), shared=False, size=len(paths) * 3 * prod(spec.size), dtype=torch.uint8)
    return check_remembering(paths, spec, memory), pixels.view(len(paths), 3, *spec.size)


def shared_file(paths: Sequence[FileOrBytes], spec: ImageSpec, cache: Path) -> Path:
    """Where processes of this machine share the pixels of these images, as their files are now."""
    found = hashlib.sha256(f"{decided_by(spec)} {[stamp(path) for path in paths]}".encode(errors="surrogatepass"))
    return cache / f"pixels-{platform.node()}-{found.hexdigest()[:16]}.bin"


def verdict(path: FileOrBytes, spec: ImageSpec, keep: Tensor | None = None) -> Verdict:
    try:
        pixels = load_image(path, spec)
        if keep is not None:
            keep.copy_(torch.from_numpy(pixels))
        return "", digest_of(path)
    except ImageError as error:
        return str(error), ""


def digest_of(path: FileOrBytes) -> str:
    """A digest of a file's bytes, or of bytes. Raises ImageError where they can't be read any more."""
    if isinstance(path, bytes):
        return hashlib.blake2b(path, digest_size=12).hexdigest()
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


def check_remembering(paths: Sequence[FileOrBytes], spec: ImageSpec, memory: Path) -> dict[FileOrBytes, Verdict]:
    known = remembered(memory)
    stamps = {path: stamp(path) for path in paths}
    unseen = [path for path in paths if stamps[path] not in known]
    if unseen:
        known = remember(unseen, in_threads(lambda path: verdict(path, spec), unseen), memory)
    return {path: known[stamps[path]] for path in paths}


def remember(paths: Sequence[FileOrBytes], verdicts: Sequence[Verdict], memory: Path) -> dict[Stamp, Verdict]:
    """All that is remembered, with these."""
    known = remembered(memory) | dict(zip(map(stamp, paths), verdicts, strict=True))
    stamped, found = zip(*known, strict=True), zip(*known.values(), strict=True)
    columns = dict(zip(("path", "size", "changed", "reason", "digest"), [*stamped, *found], strict=True))
    written = memory.with_suffix(".tmp")
    pq.write_table(pa.table(columns), written)
    os.replace(written, memory)
    return known


def remembered(memory: Path) -> dict[Stamp, Verdict]:
    """Verdicts by stamp; none where the file is not there, or is corrupt: the images are then decoded again."""
    try:
        t = pq.read_table(memory).to_pydict()
        stamped = zip(t["path"], t["size"], t["changed"], strict=True)
        return dict(zip(stamped, zip(t["reason"], t["digest"], strict=True), strict=True))
    except (FileNotFoundError, pa.ArrowException, KeyError):
        return {}


def stamp(path: FileOrBytes) -> Stamp:
    if isinstance(path, bytes):
        return (f"bytes {digest_of(path)}", len(path), 0)
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
