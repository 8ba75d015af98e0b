"""Evaluation: scores of a run, whole and by group."""

from fusion.evaluation.scores import Score, scores_by_group

__all__ = ["Score", "scores_by_group"]
