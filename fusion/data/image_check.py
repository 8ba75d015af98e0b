"""Opens every distinct image before training starts: lists unreadable ones, and holds a small set decoded in memory."""

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

from fusion.console import Heartbeat, print_rank_zero
from fusion.errors import UserError
from fusion.processing.images import FileOrBytes, ImageError, ImageSpec, cores, load_image

VERSION = 3  # of what `images` accepts: raise it when the same file would get a different verdict
A_DAY_S = 86_400

Verdict = tuple[str, str]  # the reason why an image can't be used, "" if readable; the digest of its file, "" if unreadable
Stamp = tuple[str, int, int]  # a file's path, size and modification time in ns; -1 for a missing file


class Checked(NamedTuple):
    """The result of checking images. pixels: uint8 (U, C, H, W), None where they don't fit into memory. bad: path (or bytes) -> reason.
    digests: of the bytes of every readable image."""

    pixels: Tensor | None
    bad: dict[FileOrBytes, str]
    digests: dict[FileOrBytes, str]


def check_images(paths: Sequence[FileOrBytes], spec: ImageSpec, *, memory_gib: float, cache: Path, shared: bool = False) -> Checked:
    """Decode every image once. The pixels are returned if they fit into `memory_gib`.

    shared: other processes of this machine check the same images: the first one decodes them, and all map one file of pixels in `cache`
    into memory, which the system holds once. The file (`shared_file`) may be removed as soon as all processes have mapped it.

    Verdicts on images that don't fit into memory, or are shared, are stored in `cache`, by path, size and modification time of the file,
    and by everything else that decides them, so that the next run (and the other processes of this one) need not decode them again.
    """
    fits = len(paths) * spec.channels * spec.size[0] * spec.size[1] <= memory_gib * 2**30
    pixels: Tensor | None = None
    if fits and not (shared and paths):
        pixels = decoded = torch.zeros(len(paths), spec.channels, *spec.size, dtype=torch.uint8)
        verdicts = dict(zip(paths, in_threads(lambda i: verdict(paths[i], spec, decoded[i]), range(len(paths))), strict=True))
    else:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / "checked.lock"):
                stored = cache / f"checked-{decided_by(spec)}.parquet"
                verdicts, pixels = check_shared(paths, spec, stored) if fits else (check_with_stored(paths, spec, stored), None)
        except OSError as error:
            raise UserError(f"can't write to {cache}: {error.strerror or error}. Choose another folder: --data.cache=FOLDER") from error
    bad = {path: reason for path, (reason, _) in verdicts.items() if reason}
    digests = {path: digest for path, (reason, digest) in verdicts.items() if not reason}
    return Checked(pixels, bad, digests)


def check_shared(paths: Sequence[FileOrBytes], spec: ImageSpec, stored: Path) -> tuple[dict[FileOrBytes, Verdict], Tensor]:
    """Verdicts, and the pixels (U, C, H, W) mapped from a file that the first process makes. The mapping is private (copy on write)."""
    file = shared_file(paths, spec, stored.parent)
    if not file.is_file():
        for older in stored.parent.glob(f"pixels-{platform.node()}-*"):  # of runs that were killed
            if time.time() - older.stat().st_mtime > A_DAY_S:
                older.unlink(missing_ok=True)
        shape, written = (len(paths), spec.channels, *spec.size), file.with_suffix(".tmp")
        with open(written, "wb") as room:  # a full disk is reported now, and not by a signal while pixels are written
            os.posix_fallocate(room.fileno(), 0, prod(shape)) if hasattr(os, "posix_fallocate") else room.truncate(prod(shape))
        decoded = torch.from_file(str(written), shared=True, size=prod(shape), dtype=torch.uint8).view(shape)
        store_verdicts(paths, in_threads(lambda i: verdict(paths[i], spec, decoded[i]), range(len(paths))), stored)
        os.replace(written, file)
    pixels = torch.from_file(str(file), shared=False, size=len(paths) * spec.channels * prod(spec.size), dtype=torch.uint8)
    return check_with_stored(paths, spec, stored), pixels.view(len(paths), spec.channels, *spec.size)


def shared_file(paths: Sequence[FileOrBytes], spec: ImageSpec, cache: Path) -> Path:
    """The file by which processes of this machine share the pixels of these images, in the present state of their files."""
    key = hashlib.sha256(f"{decided_by(spec)} {[stamp(path) for path in paths]}".encode(errors="surrogatepass"))
    return cache / f"pixels-{platform.node()}-{key.hexdigest()[:16]}.bin"


def verdict(path: FileOrBytes, spec: ImageSpec, out: Tensor | None = None) -> Verdict:
    """The verdict on one image. out: receives its pixels."""
    try:
        pixels = load_image(path, spec)
        if out is not None:
            out.copy_(torch.from_numpy(pixels))
        return "", digest_of(path)
    except ImageError as error:
        return str(error), ""


def digest_of(path: FileOrBytes) -> str:
    """The digest of a file's bytes, or of bytes. Raises ImageError where the file can no longer be read."""
    if isinstance(path, bytes):
        return hashlib.blake2b(path, digest_size=12).hexdigest()
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=12)).hexdigest()
    except OSError as error:
        raise ImageError(error.strerror or str(error)) from error


def decided_by(spec: ImageSpec) -> str:
    """The digest of everything but the file that decides whether it is readable: limits, size, versions of the decoding libraries."""
    libraries = {name: features.version(name) for name in sorted(features.get_supported())}
    key = json.dumps([VERSION, asdict(spec), PIL.__version__, libraries], default=str)
    return hashlib.sha256(key.encode()).hexdigest()[:12]


def check_with_stored(paths: Sequence[FileOrBytes], spec: ImageSpec, stored: Path) -> dict[FileOrBytes, Verdict]:
    """The verdicts on these images; those not yet stored in the file are decoded and added to it."""
    known = stored_verdicts(stored)
    stamps = {path: stamp(path) for path in paths}
    unseen = [path for path in paths if stamps[path] not in known]
    if unseen:
        known = store_verdicts(unseen, in_threads(lambda path: verdict(path, spec), unseen), stored)
    return {path: known[stamps[path]] for path in paths}


def store_verdicts(paths: Sequence[FileOrBytes], verdicts: Sequence[Verdict], stored: Path) -> dict[Stamp, Verdict]:
    """Add these verdicts to the file; returns all that it holds."""
    known = stored_verdicts(stored) | dict(zip(map(stamp, paths), verdicts, strict=True))
    stamps, verdict_columns = zip(*known, strict=True), zip(*known.values(), strict=True)
    columns = dict(zip(("path", "size", "changed", "reason", "digest"), [*stamps, *verdict_columns], strict=True))
    written = stored.with_suffix(".tmp")
    pq.write_table(pa.table(columns), written)
    os.replace(written, stored)
    return known


def stored_verdicts(stored: Path) -> dict[Stamp, Verdict]:
    """Stored verdicts by stamp; none where the file is missing or corrupt: the images are then decoded again."""
    try:
        t = pq.read_table(stored).to_pydict()
        stamps = zip(t["path"], t["size"], t["changed"], strict=True)
        return dict(zip(stamps, zip(t["reason"], t["digest"], strict=True), strict=True))
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
    """`function` of each item, in order, in threads, since Pillow releases the GIL. Prints its progress from time to time."""
    results: list[Verdict] = []
    sign = Heartbeat()
    with ThreadPoolExecutor(max_workers=min(32, cores())) as pool:
        for result in pool.map(function, items, chunksize=16):
            results.append(result)
            if sign.due():
                print_rank_zero(f"checked {len(results):,} of {len(items):,} images")
    return results
