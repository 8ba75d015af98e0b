"""Losses, torch alone: each gives the loss of every sample, (B,), to be averaged by whoever trains."""

from fusion.losses.classification import effective_number_weights, focal_loss, logit_adjusted_loss
from fusion.losses.contrastive import info_nce_loss, sigmoid_pair_loss
from fusion.losses.distillation import feature_loss, soft_label_loss, soft_target_loss
from fusion.losses.multi_label import asymmetric_loss, binary_focal_loss
from fusion.losses.ordinal import cumulative_link_loss, cumulative_log_probabilities, cumulative_logits
from fusion.losses.regression import gaussian_loss, quantile_loss

__all__ = [
    "asymmetric_loss",
    "binary_focal_loss",
    "cumulative_link_loss",
    "cumulative_log_probabilities",
    "cumulative_logits",
    "effective_number_weights",
    "feature_loss",
    "focal_loss",
    "gaussian_loss",
    "info_nce_loss",
    "logit_adjusted_loss",
    "quantile_loss",
    "sigmoid_pair_loss",
    "soft_label_loss",
    "soft_target_loss",
]
