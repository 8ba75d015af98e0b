"""fusion: train models that look at an image and read a text together."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusion.predictor import Predictor


def load(run: str, **options: Any) -> "Predictor":
    """A finished run (its folder, or a checkpoint file), ready to be asked: see `fusion.predictor.Predictor`."""
    # Imported here, so that fusion.heads alone loads nothing but torch.
    from fusion.predictor import Predictor

    return Predictor.load(run, **options)
