"""The folder of a package: written at once or not at all, and verified by checksums."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusion.errors import UserError, first_line

FORMAT = 1  # version of packages
PACKAGE, PROCESSOR, CARD, SUMS = "package.json", "processor.json", "README.md", "SHA256SUMS"


def is_package(folder: str | Path) -> bool:
    """Whether a folder contains a package."""
    return (Path(folder).expanduser() / PACKAGE).is_file()


@contextmanager
def new_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside `folder`, which takes its place if the block succeeds, and is removed if it doesn't.

    replace: whether an earlier package there may be replaced. Raises UserError for a folder that can't be written or holds anything else.
    """
    folder = folder.absolute()
    check_free(folder, replace=replace)
    temporary, earlier = (folder.with_name(f".{folder.name}-{what}-{os.getpid()}") for what in ("new", "old"))
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        sums = "".join(f"{digest_of(path)}  {path.relative_to(temporary).as_posix()}\n" for path in files_in(temporary))
        (temporary / SUMS).write_text(sums, encoding="utf-8")
        if folder.exists():
            os.replace(folder, earlier)
        try:
            os.replace(temporary, folder)
        except OSError:
            if earlier.exists():
                os.replace(earlier, folder)
            raise
        shutil.rmtree(earlier, ignore_errors=True)
    except OSError as error:
        raise UserError(f"can't write {folder} ({error.strerror or first_line(error)}); nothing of it is left") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(folder: Path, *, replace: bool) -> None:
    """Raises UserError unless a package may be written to this folder."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; expected a folder to write")
    if not is_package(folder) or {path.relative_to(folder).as_posix() for path in files_in(folder)} != listed_in(folder).keys():
        raise UserError(f"{folder} holds other files than a package; give another folder")
    if not replace:
        raise UserError(f"there is a package in {folder} already; replace it by --replace, or give another folder")


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)


def digest_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path) -> str:
    """Compares every file of a package with SHA256SUMS; returns the package's version, which changes with any of them.

    Raises UserError for a file that is missing, was altered or isn't listed.
    """
    expected = listed_in(folder)
    found = {path.relative_to(folder).as_posix() for path in files_in(folder)}
    for name in sorted(found | set(expected)):
        if name not in found:
            raise UserError(f"the package {folder} lacks {name}: copy it again, or export it again")
        if name not in expected:
            raise UserError(f"the package {folder} has a file that it was not written with: {name}")
        if digest_of(folder / name) != expected[name]:
            raise UserError(f"{folder / name} was altered after the export (its checksum differs): copy it again, or export it again")
    return digest_of(folder / SUMS)[:12]


def listed_in(folder: Path) -> dict[str, str]:
    """The digests of a package's files by name, as they were written. Raises UserError for a folder without the list."""
    return {name: digest for digest, _, name in (line.partition("  ") for line in read_text(folder / SUMS).splitlines())}


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"can't read {path} ({first_line(error)}): it is no package, or an incomplete one") from error


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError for a file that is missing or isn't a JSON object."""
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is a {type(content).__name__}; expected an object")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_about(folder: Path) -> dict[str, Any]:
    """The description of a package. Raises UserError for one of a newer version."""
    about = read_json(folder / PACKAGE)
    if about.get("format") != FORMAT:
        newer = isinstance(about.get("format"), int) and about["format"] > FORMAT
        remedy = f"it was written by fusion {about.get('fusion')}: install that version" if newer else "export the run again"
        raise UserError(f"{folder} has package format {about.get('format')}, this version of fusion reads {FORMAT}; {remedy}")
    return about
