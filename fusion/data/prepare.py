"""From nothing, or from a published data set's own files, to a manifest: made once, kept, found again by its options."""

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
    """Writes a folder with manifest.csv and whatever it refers to."""

    @abstractmethod
    def key(self, root: Path | None) -> str:
        """A folder name that changes with everything on which the result depends."""

    @abstractmethod
    def prepare(self, folder: Path, root: Path | None) -> str:
        """Write into `folder`, from the files under `root` if it needs any; give back what to tell the user."""


class Script(Preparer):
    """A Python file with a function `prepare(root: Path, folder: Path) -> str`: turns a published layout into folder/manifest.csv.

    Args:
        path: the file; those of the repository stand under data/.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"data.preparer: there is no file {self.path}")

    def key(self, root: Path | None) -> str:
        if root is None:
            raise UserError(f"{self.path.stem}: say where its files are: --data.root=FOLDER (its layout is described in {self.path})")
        if not root.is_dir():
            raise UserError(f"{self.path.stem}: data.root is {root}, which is no folder")
        digest = hashlib.sha256(self.path.read_bytes() + str(root.resolve()).encode())
        for file in sorted(path for path in root.rglob("*") if path.is_file()):
            stamp = file.stat()
            digest.update(f"{file.relative_to(root)}|{stamp.st_size}|{stamp.st_mtime_ns}\n".encode(errors="surrogateescape"))
        return f"{self.path.stem}-{digest.hexdigest()[:12]}"

    def prepare(self, folder: Path, root: Path | None) -> str:
        return str(runpy.run_path(str(self.path))["prepare"](root, folder))


def prepared(preparer: Preparer, root: Path | None, cache: Path) -> tuple[Path, str]:
    """The preparer's folder under `cache`, made now if it isn't there, and what it told when it was made.

    Several processes may ask at once: one makes it, in a folder of its own that gets its name when it is whole; the others wait.
    """
    if root is not None and cache.resolve().is_relative_to(root.resolve()):
        raise UserError(f"data.cache is {cache}, inside data.root, {root}, which would change with it. Another place: --data.cache=FOLDER")
    folder = cache / preparer.key(root)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                making = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache))
                try:
                    (making / "card.txt").write_text(preparer.prepare(making, root), encoding="utf-8")
                    os.replace(making, folder)
                finally:
                    shutil.rmtree(making, ignore_errors=True)
    except OSError as error:
        raise UserError(f"can't prepare data in {cache}: {error}. Another place: --data.cache=FOLDER") from error
    return folder, (folder / "card.txt").read_text(encoding="utf-8")


def default_cache() -> Path:
    """$FUSION_CACHE, or fusion/ under the user's cache folder."""
    named = os.environ.get("FUSION_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusion"
