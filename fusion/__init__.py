"""fusion: train models that fuse several inputs: images, texts, columns of numbers and categories."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusion.api import Run, fit
    from fusion.predictor import Predictor


def load(run: str, **options: Any) -> "Predictor":
    """Load a trained model from a run folder, a model folder or a checkpoint file; returns a `fusion.predictor.Predictor`."""
    # Imported here, so that importing fusion.heads loads torch only.
    from fusion.predictor import Predictor

    return Predictor.load(run, **options)


def __getattr__(name: str) -> Any:
    if name in ("Run", "fit"):
        return getattr(import_module("fusion.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["Run", "fit", "load"]
