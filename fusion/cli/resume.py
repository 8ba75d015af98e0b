"""Continuing a run: what it must have, and what may differ from before."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fusion.cli.parser import words
from fusion.errors import UserError


def resumed_run(arguments: Sequence[str]) -> Path | None:
    """The folder after --resume, checked."""
    folders = [Path(word) for is_value, word in words(arguments, "--resume") if is_value]
    if not folders:
        return None
    folder = folders[-1]
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"can't resume '{folder}': it has no recipe.yaml; expected the run folder that fit printed")
    if not has_checkpoint(folder):
        raise UserError(f"can't resume '{folder}': it has no checkpoints/last.ckpt; it ended before its first checkpoint, so start it anew")
    return folder


def has_checkpoint(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("*.ckpt"))


MAY_DIFFER = ("trainer.devices", "trainer.num_nodes", "trainer.accelerator", "trainer.strategy", "checkpoint.")


def refuse_difference(now: str, then: str) -> None:
    """A resumed run keeps its recipe: anything else would be a different run that looks like the old one. But it may have other devices:
    the global batches, and their order, are the same on any number.
    """
    new, old = flat(yaml.safe_load(now)), flat(yaml.safe_load(then))
    different = [
        f"{key} is {new.get(key)} (was {old.get(key)})"
        for key in {**old, **new}
        if new.get(key) != old.get(key) and not key.startswith(MAY_DIFFER)
    ]
    if different:
        raise UserError(f"--resume keeps the run's recipe; these differ: {'; '.join(different[:5])}. Leave them out, or start a new run")


def flat(settings: Any, above: str = "") -> dict[str, Any]:
    """Settings by their dotted keys."""
    if not isinstance(settings, dict):
        return {above: settings}
    return {key: value for name, inner in settings.items() for key, value in flat(inner, f"{above}.{name}" if above else name).items()}
