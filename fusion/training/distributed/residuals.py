"""What sign compression has left to say: a file for each rank beside the checkpoint, so that no rank ever holds another's.

checkpoints/residuals/update-120-rank-3-of-64.pt. Written before the checkpoint that names them, removed once no checkpoint does.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion.errors import UserError
from fusion.runs.checkpoint_files import DAMAGE, find_damage
from fusion.training.callbacks.checkpoints import save_whole

FOLDER = "residuals"
NAME = re.compile(r"update-(\d+)-rank-\d+-of-(\d+)\.pt")


def path_of(checkpoints: Path, updates: int, rank: int, world: int) -> Path:
    return checkpoints / FOLDER / f"update-{updates}-rank-{rank}-of-{world}.pt"


def write(path: Path, residual: dict[str, Tensor]) -> None:
    """A rank's share, by parameter name: whole or not at all. Raises UserError where it can't be written."""
    try:
        save_whole(residual, path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"can't save {path}, a rank's share of the checkpoint ({error})") from error


def read(checkpoints: Path, updates: int, world: int, rank: int, world_now: int) -> dict[str, Tensor]:
    """A rank's own share; with another number of ranks, an equal share of what all had left. Raises UserError where a file is missing or
    corrupt."""
    ranks = [rank] if world == world_now else range(world)
    total: dict[str, Tensor] = {}
    for share in whole_shares(checkpoints, updates, world, ranks):
        for name, part in share.items():
            total[name] = total[name] + part if name in total else part
    return total if world == world_now else {name: part / world for name, part in total.items()}


def whole_shares(checkpoints: Path, updates: int, world: int, ranks: Any) -> Iterator[dict[str, Tensor]]:
    for rank in ranks:
        path = path_of(checkpoints, updates, rank, world)
        damage = find_damage(path) if path.is_file() else "it is missing"
        if damage:
            raise UserError(f"can't go on from {path.parent.parent}: {path}, what rank {rank} had left to say, is not whole ({damage})")
        yield torch.load(path, map_location="cpu", weights_only=True)


def clean(checkpoints: Path) -> None:
    """Remove the shares that no checkpoint names; none where one can't be read, whose shares are not known."""
    named = set()
    for file in checkpoints.glob("*.ckpt"):
        try:
            held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["fusion"]["compression"]  # not its tensors
        except DAMAGE:
            return
        named.add((str(held.get("updates")), str(held.get("world"))))
    for file in (checkpoints / FOLDER).glob("update-*.pt"):
        found = NAME.fullmatch(file.name)
        if found and found.groups() not in named:
            file.unlink(missing_ok=True)
    for torn in (checkpoints / FOLDER).glob(".update-*"):  # of a rank that was killed while it wrote; none writes now
        torn.unlink(missing_ok=True)
