"""fusion fit: train a model from a recipe, or resume a run."""

from fusion.session import fit

__all__ = ["fit"]
