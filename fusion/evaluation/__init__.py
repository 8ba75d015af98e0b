"""Evaluation: scores of a run, whole and by group, and bounds of what one input alone could score."""

from fusion.evaluation.bounds import bounds
from fusion.evaluation.scores import score, scores_by_group

__all__ = ["bounds", "score", "scores_by_group"]
