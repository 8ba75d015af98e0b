"""Reading a checkpoint without running any code of it, and without believing a corrupt one."""

import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from fusion.errors import UserError

# What zipfile meets in a file that is no longer what was written.
DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, OverflowError, ValueError, OSError)

A_FOLDER = 0x10  # the bit in a member's attributes


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint on the CPU. Raises UserError if it is missing, corrupt, or would have to run code to be loaded.

    torch writes a checksum (CRC-32) with every tensor but doesn't look at it when it reads; here it is looked at.
    """
    try:
        damage = find_damage(path)
        if damage:
            raise UserError(f"the checkpoint {path} is corrupt: {damage}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"refused to load {path}: it holds more than tensors and plain data, which could run any code") from error
    except (OSError, RuntimeError, EOFError) as error:
        raise UserError(
            f"can't read the checkpoint {path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def find_damage(path: str | Path) -> str | None:
    """What is wrong with the file of a checkpoint: torn, or altered since it was written. None if nothing is."""
    try:
        with zipfile.ZipFile(path) as archive:
            altered = archive.testzip()
            folders = [member.filename for member in archive.infolist() if member.external_attr & A_FOLDER]
        if altered:
            return f"{altered} is not what was written (its checksum differs)"
        if folders:  # torch would read nothing, and take what was in memory for it
            return f"{folders[0]} is not what was written (it is marked as a folder)"
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # whether torch finds its way in it; reads no tensor
    except (FileNotFoundError, PermissionError):
        raise
    except DAMAGE as error:
        return f"it is not whole ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return None


def newest_whole(folder: Path) -> tuple[Path, str | None]:
    """The checkpoint that a run goes on from, and what to tell if it isn't the last one. Raises UserError if none is whole."""
    corrupt: list[str] = []
    for name in ("last", "previous", "best"):
        path = folder / f"{name}.ckpt"
        if not path.is_file():
            continue
        damage = find_damage(path)
        if damage is None:
            told = f"warning: {'; '.join(corrupt)}; going on from {path.name} instead" if corrupt else None
            return path, told
        corrupt.append(f"{path.name} is corrupt: {damage}")
    raise UserError(f"can't resume {folder.parent}: {'; '.join(corrupt) or 'it has no checkpoint'}")
