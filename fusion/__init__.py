"""fusion: train models that fuse several inputs: images, texts, columns of numbers and categories."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from fusion.api import Run, fit
    from fusion.predictions import RawPredictor


def load(model: "str | Path", **options: Any) -> "RawPredictor":
    """Load a trained model: a run folder, a model folder, a checkpoint file, a package that `fusion export` wrote, or one of a Hugging Face
    Hub (hf://USER/NAME, or hf://USER/NAME@REVISION).

    Returns a `fusion.predictor.Predictor`, or a `fusion.packages.package.Package`, with the same `predict`. options: those of their `load`
    (checkpoint, device, trusted; threads, device; of a hub device, trusted).
    """
    # Imported here, so that importing fusion.heads loads torch only, and a package for ONNX Runtime loads none.
    from fusion.extras import installed
    from fusion.hub_files import is_hub_name
    from fusion.packages.folder import is_package

    with installed(f"loading {model}"):
        if is_hub_name(model):
            from fusion.deploy.hub import load_from_hub

            return load_from_hub(str(model), **options)
        if is_package(model):
            from fusion.packages.package import Package

            return Package.load(model, **options)
        from fusion.predictor import Predictor

        return Predictor.load(model, **options)


def __getattr__(name: str) -> Any:
    if name in ("Run", "fit"):
        from fusion.extras import installed

        with installed(f"fusion.{name}"):
            return getattr(import_module("fusion.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["Run", "fit", "load"]
