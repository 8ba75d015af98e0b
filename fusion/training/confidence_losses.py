"""Training losses of dynamic fusion: heads that weight modalities by their confidence learn what confidence is.

Methods of `model.balance`, since they depend on each modality's own loss.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusion.errors import UserError
from fusion.heads.confidence_weighted import energy_confidence
from fusion.training.balance import Balance, Predictions, Training
from fusion.training.distributed.collectives import summed


def check_weight(weight: float) -> float:
    if not 0 <= weight < math.inf:
        raise UserError(f"model.balance: weight is {weight}; expected a number of at least 0")
    return weight


class PDF(Balance):
    """Trains predicted confidences towards the probability that each modality gives to the true class.

        loss = L + sum_m L_m + weight * sum_m (c_m - p_m(true class))^2

    Source: Cao et al. (2024), "Predictive Dynamic Fusion". For the head PredictedConfidence.

    Args:
        weight: weight of the confidences' squared errors; at least 0.
    """

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = check_weight(weight)

    def begin(self, engine: Training) -> None:
        assert engine.model is not None
        if not hasattr(engine.model.head, "predict_confidence"):
            raise UserError(
                f"model.balance: PDF trains the confidences that PredictedConfidence predicts, which {type(engine.model.head).__name__} "
                "doesn't; use --model.head=PredictedConfidence, or another method"
            )

    def regularisation(self, predictions: Predictions) -> Tensor | float:
        assert predictions.confidence is not None
        total: Tensor | float = 0.0
        for name, confidence in predictions.confidence.items():
            error = (confidence - predictions.scores[name].detach()).square()
            total = total + torch.where(predictions.present[name], error, 0.0).mean()
        return self.weight * total


class QMF(Balance):
    """Ranks each modality's confidences like its losses in the training so far: a sample that is hard for it gets a low confidence.

        loss = L + sum_m L_m + weight * sum_m mean over pairs (i, j) of max(0, sgn(l_i - l_j) (k_i - k_j) + |l_i - l_j|)

    k is the energy's confidence, log sum_c exp f_mc / 10; l a sample's mean loss over its epochs, scaled by the least and greatest of all
    samples to 0...1. Pairs are neighbours in the batch of a device: with accumulation or several ranks other samples are paired, of the
    same losses. A pair that lacks the modality doesn't count.

    Source: Zhang et al. (2023), "Provable Dynamic Fusion for Low-Quality Multimodal Data" (QMF), after the ranking of Moon et al. (2020),
    "Confidence-Aware Learning for Deep Neural Networks". For the head ConfidenceWeighted with score "energy".

    Args:
        weight: weight of the ranking; at least 0.
    """

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = check_weight(weight)
        self.world_size = 1
        # By modality (2, n): sum and number of a sample's losses. `before` is of the epochs that ended, the same on all ranks; `added` what
        # this rank added since, `restored` what all ranks had added when the checkpoint was written.
        self.before: dict[str, Tensor] = {}
        self.added: dict[str, Tensor] = {}
        self.restored: dict[str, Tensor] = {}

    def begin(self, engine: Training) -> None:
        assert engine.model is not None
        if getattr(engine.model.head, "score", None) != "energy":
            raise UserError(
                f"model.balance: QMF ranks the energies by which ConfidenceWeighted with score 'energy' weights modalities; the head is "
                f"{type(engine.model.head).__name__}; use --model.head=ConfidenceWeighted --model.head.score=energy, or another method"
            )
        self.world_size = engine.trainer.world_size
        count = len(engine.trainer.datamodule.splits["train"].samples)
        for sums in (self.before, self.added, self.restored):
            for name in engine.modalities:
                sums.setdefault(name, torch.zeros(2, count))

    def regularisation(self, predictions: Predictions) -> Tensor | float:
        total: Tensor | float = 0.0
        for name, logits in predictions.by_modality.items():
            loss, present = predictions.losses[name].detach().float(), predictions.present[name]
            known = present & loss.isfinite() & (predictions.sample >= 0)
            history = self.record(name, predictions.sample.clamp(min=0), torch.where(known, loss, 0.0), known)
            confidence = energy_confidence(logits.float())
            total = total + ranking_loss(confidence, history, known).mean()
        return self.weight * total

    def record(self, name: str, sample: Tensor, loss: Tensor, known: Tensor) -> Tensor:
        """Adds the losses (B,) of the samples; returns the mean of each sample's losses (B,), scaled to 0...1."""
        for sums in (self.before, self.added, self.restored):
            sums[name] = sums[name].to(loss.device)
        new = torch.stack([loss, known.float()])
        self.added[name] = self.added[name].index_add(1, sample, new)
        past = self.before[name]
        means = (past[0, sample] + new[0]) / (past[1, sample] + new[1]).clamp(min=1)
        # The least and greatest of the samples of past epochs and of this batch; of all samples, whatever rank has them.
        every = torch.cat([past[0] / past[1].clamp(min=1), means])
        counted = torch.cat([past[1] > 0, known])
        least = torch.where(counted, every, math.inf).amin()
        greatest = torch.where(counted, every, -math.inf).amax()
        spread = greatest - least
        # Equal losses have no order; where nothing counts, least and greatest are infinite.
        return torch.where(known & (spread > 0), (means - least) / spread, 0.0)

    def end_epoch(self, engine: Training) -> None:
        for name, added in self.all_added().items():
            self.before[name] = self.before[name] + added
            self.added[name], self.restored[name] = torch.zeros_like(added), torch.zeros_like(added)

    def all_added(self) -> dict[str, Tensor]:
        """What all ranks have added in this epoch. A collective: all ranks call it."""
        return {name: self.restored[name].to(added.device) + summed(added, self.world_size) for name, added in self.added.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"before": on_cpu(self.before), "added": on_cpu(self.all_added())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.before, self.restored = dict(state["before"]), dict(state["added"])


def ranking_loss(confidence: Tensor, history: Tensor, known: Tensor) -> Tensor:
    """Ranking losses (n,) of each sample and the next, cyclically, from confidences and scaled losses (n,); 0 where either is not known.

    >>> ranking_loss(torch.tensor([0.9, 0.2]), torch.tensor([1.0, 0.0]), torch.tensor([True, True]))
    tensor([1.7000, 1.7000])
    """
    difference = history - history.roll(-1)
    losses = (difference.sign() * (confidence - confidence.roll(-1)) + difference.abs()).clamp(min=0)
    return torch.where(known & known.roll(-1), losses, 0.0)


def on_cpu(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.cpu() for name, x in sums.items()}
