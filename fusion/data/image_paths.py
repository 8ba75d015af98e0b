"""Where the file of an image is: the path as written, or a corrected one where only that exists."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

ODD = re.compile(r"^\s|\s$|\\|^~|%[0-9a-f]{2}|^[a-z][a-z0-9+.-]+:[/\\]", re.IGNORECASE)
PECULIAR = r"^$|^[^\x21-\x7e]|[^\x21-\x7e]$|[\\%:]|^~"  # every one that is odd, blank or a drive's; as RE2 reads it
URL = re.compile(r"\s*(?!file:)[a-z][a-z0-9+.-]+://", re.IGNORECASE)
FILE_URL = re.compile(r"file:(?://[^/\\]*)?(?=[/\\])", re.IGNORECASE)
BLANKS, BACKSLASHES, HOME, FILE, ENCODED = "blanks at its ends", "backslashes", "~", "file://", "percent-encoding"


@dataclass(frozen=True)
class Located:
    """path: as written, or corrected. corrected: what was, "" for a path as written. missing: why there is no such file, and what would
    help; "" for a path that exists."""

    path: str
    corrected: str = ""
    missing: str = ""


def bytes_or_path(struct: dict[str, Any]) -> Any:
    """What a struct of a picture's bytes and path means, as Hugging Face's datasets write it: the bytes, where they are there."""
    return struct.get("bytes") if struct.get("bytes") is not None else struct.get("path")


def odd_paths(cells: Iterable[str | None]) -> set[str]:
    """The cells that may need correction; the disk need not be asked about any other."""
    return {cell for cell in set(cells) if cell and not cell.isspace() and ODD.search(cell)}


def locate(cell: str, folder: str = "") -> Located:
    """The file that an odd path means, relative to `folder`: the path as written if it exists, else corrected if that exists.

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
    return Located(written, missing=f"{written} (written with {' and '.join(seen)}; nor is there {path})")


def corrections(cell: str) -> list[tuple[str, str]]:
    """What is odd about a path, and the path after that and all before it are corrected."""
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
