"""Residuals of sign compression: a file for each rank beside the checkpoint, so that no rank loads those of all ranks.

checkpoints/residuals/update-120-rank-3-of-64.pt. Written before the checkpoint that refers to them, removed once no checkpoint does.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion.errors import UserError
from fusion.runs.checkpoint_files import CORRUPT_ERRORS, find_corruption
from fusion.training.callbacks.checkpoints import save_atomically

FOLDER = "residuals"
NAME = re.compile(r"update-(\d+)-rank-\d+-of-(\d+)\.pt")


def path_of(checkpoints: Path, updates: int, rank: int, world: int) -> Path:
    return checkpoints / FOLDER / f"update-{updates}-rank-{rank}-of-{world}.pt"


def write(path: Path, residual: dict[str, Tensor]) -> None:
    """Write a rank's residuals, by parameter name, atomically. Raises UserError where they can't be written."""
    try:
        save_atomically(residual, path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"can't save {path}, a rank's part of the checkpoint ({error})") from error


def read(checkpoints: Path, updates: int, world: int, rank: int, world_now: int) -> dict[str, Tensor]:
    """A rank's own residuals; if the number of ranks has changed, the mean of all ranks' residuals, so that the mean over ranks stays the
    same. Raises UserError where a file is missing or corrupt."""
    ranks = [rank] if world == world_now else range(world)
    total: dict[str, Tensor] = {}
    for residual in read_ranks(checkpoints, updates, world, ranks):
        for name, part in residual.items():
            total[name] = total[name] + part if name in total else part
    return total if world == world_now else {name: part / world for name, part in total.items()}


def read_ranks(checkpoints: Path, updates: int, world: int, ranks: Any) -> Iterator[dict[str, Tensor]]:
    for rank in ranks:
        path = path_of(checkpoints, updates, rank, world)
        problem = find_corruption(path) if path.is_file() else "it is missing"
        if problem:
            raise UserError(f"can't resume from {path.parent.parent}: {path}, the residuals of rank {rank}, can't be loaded ({problem})")
        yield torch.load(path, map_location="cpu", weights_only=True)


def clean(checkpoints: Path) -> None:
    """Remove the residuals that no checkpoint refers to; nothing if a checkpoint can't be read, since its residuals are unknown."""
    needed = set()
    for file in checkpoints.glob("*.ckpt"):
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["fusion"]["compression"]  # reads no tensors
        except CORRUPT_ERRORS:
            return
        needed.add((str(state.get("updates")), str(state.get("world"))))
    for file in (checkpoints / FOLDER).glob("update-*.pt"):
        match = NAME.fullmatch(file.name)
        if match and match.groups() not in needed:
            file.unlink(missing_ok=True)
    for temporary in (checkpoints / FOLDER).glob(".update-*"):  # of a rank that was killed while writing; none is writing now
        temporary.unlink(missing_ok=True)
