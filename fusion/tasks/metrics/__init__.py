"""Scores that torchmetrics lacks, or computes differently from scikit-learn."""

from fusion.tasks.metrics.classes import RANKED, CalibrationError, binary_scores, classification_metrics, one_against_rest
from fusion.tasks.metrics.collected import Collected, collected, collecting
from fusion.tasks.metrics.labels import MULTI_LABEL_SCORES, best_thresholds, multi_label_scores
from fusion.tasks.metrics.numbers import number_scores
from fusion.tasks.metrics.ranks import Pairs, retrieval_ranks, retrieval_scores

__all__ = [
    "MULTI_LABEL_SCORES",
    "RANKED",
    "CalibrationError",
    "Collected",
    "Pairs",
    "best_thresholds",
    "binary_scores",
    "classification_metrics",
    "collected",
    "collecting",
    "multi_label_scores",
    "number_scores",
    "one_against_rest",
    "retrieval_ranks",
    "retrieval_scores",
]
