"""Evaluation: scores of a run, in total and by group, and upper bounds on the scores from one input alone."""

from fusion.evaluation.bounds import bounds
from fusion.evaluation.scores import score, scores_by_group

__all__ = ["bounds", "score", "scores_by_group"]
