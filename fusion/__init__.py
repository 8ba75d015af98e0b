"""fusion: train models that fuse what a sample has: pictures, texts, columns of numbers and categories."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusion.api import Run, fit
    from fusion.predictor import Predictor


def load(run: str, **options: Any) -> "Predictor":
    """A finished run (its folder, its model's folder, or a checkpoint file), ready to be asked: see `fusion.predictor.Predictor`."""
    # Imported here, so that fusion.heads alone loads nothing but torch.
    from fusion.predictor import Predictor

    return Predictor.load(run, **options)


def __getattr__(name: str) -> Any:
    if name in ("Run", "fit"):
        return getattr(import_module("fusion.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["Run", "fit", "load"]
