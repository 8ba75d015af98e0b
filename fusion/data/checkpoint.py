"""Reading a checkpoint without running any code of it."""

import pickle
from pathlib import Path
from typing import Any

import torch

from fusion.errors import UserError


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint on the CPU. Raises UserError if it is missing, damaged, or would have to run code to be loaded."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"refused to load {path}: it holds more than tensors and plain data, which could run any code") from error
    except (OSError, RuntimeError, EOFError) as error:
        raise UserError(
            f"can't read the checkpoint {path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
