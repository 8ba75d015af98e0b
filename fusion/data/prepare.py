"""Preparers, which make a manifest from scratch or from a published data set's files; results are cached by their options."""

import hashlib
import os
import runpy
import shutil
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path

from filelock import FileLock

from fusion.errors import UserError


class Preparer(ABC):
    """Writes a folder with manifest.csv and the files that it refers to."""

    @abstractmethod
    def key(self, root: Path | None) -> str:
        """A folder name that changes with everything on which the result depends."""

    @abstractmethod
    def prepare(self, folder: Path, root: Path | None) -> str:
        """Write into `folder`, from the files under `root` if it needs any. Returns a summary to print."""


class Script(Preparer):
    """A Python file with a function `prepare(root: Path, folder: Path) -> str`: turns a published layout into folder/manifest.csv.

    Args:
        path: the Python file; those of the repository are under data/.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"data.preparer: there is no file {self.path}")

    def key(self, root: Path | None) -> str:
        if root is None:
            raise UserError(f"{self.path.stem}: needs the folder of its files: --data.root=FOLDER (the layout is described in {self.path})")
        if not root.is_dir():
            raise UserError(f"{self.path.stem}: data.root is {root}, which is not a folder")
        digest = hashlib.sha256(self.path.read_bytes() + str(root.resolve()).encode())
        for file in sorted(path for path in root.rglob("*") if path.is_file()):
            stamp = file.stat()
            digest.update(f"{file.relative_to(root)}|{stamp.st_size}|{stamp.st_mtime_ns}\n".encode(errors="surrogateescape"))
        return f"{self.path.stem}-{digest.hexdigest()[:12]}"

    def prepare(self, folder: Path, root: Path | None) -> str:
        return str(runpy.run_path(str(self.path))["prepare"](root, folder))


def prepared(preparer: Preparer, root: Path | None, cache: Path) -> tuple[Path, str]:
    """The preparer's folder under `cache`, made now if it doesn't exist, and the summary that it returned when it was made.

    Safe for concurrent processes: one makes it, in a temporary folder that is renamed when complete; the others wait.
    """
    if root is not None and cache.resolve().is_relative_to(root.resolve()):
        raise UserError(f"data.cache is {cache}, inside data.root, {root}, which it would change. Choose another one: --data.cache=FOLDER")
    folder = cache / preparer.key(root)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache))
                try:
                    (temporary / "card.txt").write_text(preparer.prepare(temporary, root), encoding="utf-8")
                    os.replace(temporary, folder)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(f"can't prepare data in {cache}: {error}. Choose another folder: --data.cache=FOLDER") from error
    return folder, (folder / "card.txt").read_text(encoding="utf-8")


def default_cache() -> Path:
    """$FUSION_CACHE, or fusion/ under the user's cache folder."""
    given = os.environ.get("FUSION_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusion"
