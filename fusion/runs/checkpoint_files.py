"""Safe reading of checkpoints: no code of the file is executed, and corrupt files are rejected."""

import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from fusion.errors import UserError

# Raised by zipfile and torch.load for a corrupt file.
CORRUPT_ERRORS = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, OverflowError, ValueError, OSError)

FOLDER_BIT = 0x10  # in the external attributes of a zip archive's member


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint on the CPU. Raises UserError if it is missing, corrupt, or would have to run code to be loaded.

    torch writes a checksum (CRC-32) with every tensor but doesn't verify it when loading; here it is verified.
    """
    try:
        corruption = find_corruption(path)
        if corruption:
            raise UserError(f"the checkpoint {path} is corrupt: {corruption}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"rejected {path}: it has more than tensors and plain data, which could run any code") from error
    except (OSError, RuntimeError, EOFError) as error:
        raise UserError(
            f"can't read the checkpoint {path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def find_corruption(path: str | Path) -> str | None:
    """How a checkpoint's file is corrupt (truncated, or altered since it was written), or None."""
    try:
        with zipfile.ZipFile(path) as archive:
            altered = archive.testzip()
            folders = [member.filename for member in archive.infolist() if member.external_attr & FOLDER_BIT]
        if altered:
            return f"{altered} has a wrong checksum"
        if folders:  # torch would read nothing and return uninitialised memory
            return f"{folders[0]} is marked as a folder"
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # checks the structure alone; reads no tensor
    except (FileNotFoundError, PermissionError):
        raise
    except CORRUPT_ERRORS as error:
        return f"it is unreadable ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return None


def newest_intact(folder: Path) -> tuple[Path, str | None]:
    """The checkpoint to resume a run from, and a warning if it isn't the last one. Raises UserError if none is intact."""
    corrupt: list[str] = []
    for name in ("last", "previous", "best"):
        path = folder / f"{name}.ckpt"
        if not path.is_file():
            continue
        corruption = find_corruption(path)
        if corruption is None:
            warning = f"warning: {'; '.join(corrupt)}; resuming from {path.name} instead" if corrupt else None
            return path, warning
        corrupt.append(f"{path.name} is corrupt: {corruption}")
    raise UserError(f"can't resume {folder.parent}: {'; '.join(corrupt) or 'it has no checkpoint'}")
