"""What use needs of a run, and nothing else: a folder with model.safetensors (weights) and model.json (encoders, head, inputs, task)."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusion.errors import UserError

FORMAT = 6  # of checkpoints, and of what a model's folder says of itself
MODEL = "model"  # the folder in a run's
WEIGHTS, ABOUT = "model.safetensors", "model.json"
NEEDED = ("format", "encoders", "head", "adapters", "processor")

Weights = dict[str, Tensor]


def is_bundle(folder: Path) -> bool:
    """Whether a folder holds a model."""
    return (folder / ABOUT).is_file()


def of_checkpoint(held: dict[str, Any], path: Path) -> tuple[dict[str, Any], Weights]:
    """What a checkpoint says of its model, and its weights. Raises UserError for one of another program or version."""
    about = held.get("fusion") if isinstance(held, dict) else None
    refuse_other_format(about, path)
    assert about is not None
    weights = {key.removeprefix("model."): value for key, value in held["state_dict"].items() if key.startswith("model.")}
    return {name: about[name] for name in NEEDED}, weights


def write_bundle(folder: Path, about: dict[str, Any], weights: Weights) -> None:
    """All of it or nothing: written beside, then put in the place of an earlier one. Raises UserError where it can't be written."""
    writing = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        writing.mkdir()
        # Copies, since weights that are tied share memory, which safetensors rejects.
        save_file({name: weight.detach().cpu().clone().contiguous() for name, weight in weights.items()}, writing / WEIGHTS)
        (writing / ABOUT).write_text(
            json.dumps({name: about[name] for name in NEEDED}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(writing, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(writing, ignore_errors=True)
        raise UserError(f"can't write the model {folder} ({error})") from error


def read_bundle(folder: Path) -> tuple[dict[str, Any], Weights]:
    """What a model's folder says of it, and its weights. Raises UserError for a file that is missing, corrupt or of another version."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"can't read {folder / ABOUT} ({str(error).splitlines()[0]})") from error
    refuse_other_format(about, folder)
    lacking = [name for name in NEEDED if name not in about]
    if lacking:
        raise UserError(f"{folder / ABOUT} lacks {', '.join(lacking)}: it is not what fusion wrote")
    try:
        return about, load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"can't read {folder / WEIGHTS} ({str(error).splitlines()[0]})") from error


def refuse_other_format(about: Any, path: Path) -> None:
    if not isinstance(about, dict) or "format" not in about:
        raise UserError(f"{path} is not a model of fusion")
    if about["format"] != FORMAT:
        raise UserError(
            f"{path} has format {about['format']}, this version of fusion reads {FORMAT}: predict with the version that trained "
            "it, or train anew (--init_from takes its weights)"
        )
