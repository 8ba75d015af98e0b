"""Finds the file of an image: the path as written, or a corrected one if only that exists."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

ODD = re.compile(r"^\s|\s$|\\|^~|%[0-9a-f]{2}|^[a-z][a-z0-9+.-]+:[/\\]", re.IGNORECASE)
PECULIAR = r"^$|^[^\x21-\x7e]|[^\x21-\x7e]$|[\\%:]|^~"  # matches every ODD path, blanks and drive letters; as RE2 reads it
URL = re.compile(r"\s*(?!file:)[a-z][a-z0-9+.-]+://", re.IGNORECASE)
FILE_URL = re.compile(r"file:(?://[^/\\]*)?(?=[/\\])", re.IGNORECASE)
BLANKS, BACKSLASHES, HOME, FILE, ENCODED = "blanks at its ends", "backslashes", "~", "file://", "percent-encoding"


@dataclass(frozen=True)
class Located:
    """A path that was looked up. path: as written, or corrected. corrected: what was corrected, "" for nothing. missing: why there is no
    such file, and a remedy; "" if it exists or the path is not odd."""

    path: str
    corrected: str = ""
    missing: str = ""


def bytes_or_path(struct: dict[str, Any]) -> Any:
    """The image of a struct of bytes and path, as Hugging Face's datasets write it: the bytes if present, else the path."""
    return struct.get("bytes") if struct.get("bytes") is not None else struct.get("path")


def odd_paths(cells: Iterable[str | None]) -> set[str]:
    """The cells that may need correction; only for these the file system is queried."""
    return {cell for cell in set(cells) if cell and not cell.isspace() and ODD.search(cell)}


def locate(cell: str, folder: str = "") -> Located:
    """The file of an oddly written path, relative to `folder`: the path as written if it exists, else a corrected one if that exists.

    >>> locate("https://example.org/a.png").missing
    'https://example.org/a.png (a URL: download it first, and give the path of the file)'
    """
    written = path = os.path.join(folder, cell)
    if os.path.lexists(written):
        return Located(written)
    if URL.match(cell):
        return Located(written, missing=f"{cell.strip()} (a URL: download it first, and give the path of the file)")
    seen: list[str] = []
    for what, text in corrections(cell):
        seen.append(what)
        path = os.path.join(folder, text)
        if os.path.exists(path):
            return Located(path, corrected=" and ".join(seen))
    if not seen:
        return Located(written)
    return Located(written, missing=f"{written} (written with {' and '.join(seen)}; {path} does not exist either)")


def corrections(cell: str) -> list[tuple[str, str]]:
    """The corrections that apply to a path, in order, each with the path after it and all earlier ones."""
    steps, text = [], cell
    for what, correct in (
        (BLANKS, str.strip),
        (FILE, lambda text: FILE_URL.sub("", text, count=1)),
        (HOME, os.path.expanduser),
        (ENCODED, unquote),
        (BACKSLASHES, lambda text: text.replace("\\", "/")),
    ):
        corrected = correct(text)
        if corrected != text:
            steps.append((what, corrected))
            text = corrected
    return steps
