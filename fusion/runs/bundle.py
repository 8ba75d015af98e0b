"""The model of a run, for prediction: a folder with model.safetensors (weights) and model.json (encoders, head, inputs, task)."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusion.errors import UserError

FORMAT = 7  # version of checkpoints and of model.json
MODEL = "model"  # folder name within a run's folder
WEIGHTS, ABOUT = "model.safetensors", "model.json"
NEEDED = ("format", "encoders", "head", "adapters", "processor")
PRUNED = "pruned"  # the widths that pruning left, if any

Weights = dict[str, Tensor]


def is_bundle(folder: Path) -> bool:
    """Whether a folder contains a model."""
    return (folder / ABOUT).is_file()


def of_checkpoint(checkpoint: dict[str, Any], path: Path) -> tuple[dict[str, Any], Weights]:
    """The description of a checkpoint's model, and its weights. Raises UserError for one of another program or version."""
    about = checkpoint.get("fusion") if isinstance(checkpoint, dict) else None
    reject_other_format(about, path)
    assert about is not None
    weights = {key.removeprefix("model."): value for key, value in checkpoint["state_dict"].items() if key.startswith("model.")}
    return described(about), weights


def write_bundle(folder: Path, about: dict[str, Any], weights: Weights) -> None:
    """Write the folder atomically: a temporary folder replaces an earlier one. Raises UserError where it can't be written."""
    temporary = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        temporary.mkdir()
        # Cloned, since safetensors rejects tensors that share memory (tied weights).
        save_file({name: weight.detach().cpu().clone().contiguous() for name, weight in weights.items()}, temporary / WEIGHTS)
        (temporary / ABOUT).write_text(json.dumps(described(about), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        shutil.copymode(temporary / ABOUT, temporary / WEIGHTS)  # which safetensors lets its owner alone read
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"can't write the model {folder} ({error})") from error


def read_bundle(folder: Path) -> tuple[dict[str, Any], Weights]:
    """A model's description (model.json) and weights. Raises UserError for a file that is missing, corrupt or of another version."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"can't read {folder / ABOUT} ({str(error).splitlines()[0]})") from error
    reject_other_format(about, folder)
    missing = [name for name in NEEDED if name not in about]
    if missing:
        raise UserError(f"{folder / ABOUT} has no {', '.join(missing)}: it was not written by fusion")
    try:
        return about, load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"can't read {folder / WEIGHTS} ({str(error).splitlines()[0]})") from error


def described(about: dict[str, Any]) -> dict[str, Any]:
    """What a model's description consists of."""
    return {name: about[name] for name in NEEDED} | ({PRUNED: about[PRUNED]} if about.get(PRUNED) else {})


def reject_other_format(about: Any, path: Path) -> None:
    if not isinstance(about, dict) or "format" not in about:
        raise UserError(f"{path} is not a model of fusion")
    if about["format"] != FORMAT:
        raise UserError(
            f"{path} has format {about['format']}, this version of fusion reads {FORMAT}: predict with the version that trained "
            "it, or train again (--init_from takes its weights)"
        )
