"""fusion fit: train a model by recipe, or continue a run."""

from fusion.session import fit

__all__ = ["fit"]
