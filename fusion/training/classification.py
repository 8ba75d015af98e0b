"""The task of telling one class of several."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric

from fusion.data.module import ImageTextData
from fusion.data.samples import Batch
from fusion.evaluation.metrics import classification_metrics, per_split
from fusion.training.balance import summed
from fusion.training.modality_dropout import presence
from fusion.training.task import Task


class Classification(Task):
    """Train a FusionModel to tell one class of several, by cross entropy.

    Args:
        label_smoothing: share of each target spread over all classes (Szegedy et al., 2016).
        class_weights: "balanced" weighs each class by the inverse of its frequency in train.
        options: those of every task (Task).
    """

    kind = "classification"
    weight: Tensor | None

    def __init__(self, label_smoothing: float = 0.0, class_weights: Literal["none", "balanced"] = "none", **options: Any) -> None:
        super().__init__(**options)
        self.label_smoothing, self.class_weights = label_smoothing, class_weights

    def outputs(self, data: ImageTextData) -> int:
        return len(data.processor.classes)

    def prepare(self, data: ImageTextData) -> None:
        classes = self.outputs(data)
        scored = [name for name in data.splits if name != "train"]
        self.metrics = per_split(classes + data.unseen_labels, scored)
        self.mean_loss = nn.ModuleDict({name: MeanMetric() for name in scored})
        self.register_buffer("weight", balanced(data, classes) if self.class_weights == "balanced" else None, persistent=False)

    def metric_names(self) -> list[str]:
        trained = [f"train/{name}_{over}" for name in ("loss", "accuracy") for over in ("step", "epoch")]
        return [*super().metric_names(), *trained, *(f"val/{name}" for name in [*classification_metrics(2), "loss"])]

    # Steps.

    def forward(self, inputs: dict[str, Any]) -> Tensor:  # (B, C)
        assert self.model is not None
        return self.model(inputs).output

    def loss(self, logits: Tensor, target: Tensor, update_target: Tensor | None = None) -> Tensor:
        """The mean of the samples' losses, weighted by class: divided by the mean weight of the whole update (update_target), so that the
        means of its shares, over ranks and accumulated batches, have the update's own weighted mean for their mean.
        """
        return self.sample_loss(logits, target, update_target).mean()

    def sample_loss(self, logits: Tensor, target: Tensor, update_target: Tensor | None = None) -> Tensor:  # (B,)
        each = cross_entropy(logits, target, weight=self.weight, label_smoothing=self.label_smoothing, reduction="none")
        if self.weight is None:
            return each
        return each / self.weight[target if update_target is None else update_target].mean()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        output, kept = self.read(batch.inputs)
        loss = self.loss(output.output, batch.target, batch.update_target)
        if self.balance is not None:
            there = kept or presence(batch.inputs)
            alone = self.losses_alone(output.by_modality, batch, there)
            self.balance.observe(self, alone, true_class_scores(output.by_modality, batch.target, there))
            loss = self.balance.total(loss, alone)
        hits = (output.output.detach().argmax(dim=1) == batch.target).float().mean()
        self.note({"loss": loss, "accuracy": hits}, len(batch.target), batch_idx)
        return loss

    def losses_alone(self, by_modality: dict[str, Tensor], batch: Batch, there: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each modality's own loss, over the batch: 0 for a sample that lacks it. So shares of a batch have the mean of their losses."""
        each = {name: self.sample_loss(logits, batch.target, batch.update_target) for name, logits in by_modality.items()}
        return {name: torch.where(there[name], loss, 0.0).mean() for name, loss in each.items()}

    @torch.no_grad()
    def sample_losses(self, split: str, most: int | None = None) -> dict[str, Tensor]:
        assert self.model is not None
        data: ImageTextData = self.trainer.datamodule  # type: ignore[attr-defined]
        count = len(data.splits[split].samples)
        count = count if most is None else min(count, most)
        training = self.training
        self.eval()
        # Each rank fills the rows that it saw: losses, and which there are.
        found: dict[str, Tensor] = {}
        for batch in data.evaluation_loader(split, most):
            moved = self.trainer.strategy.batch_to_device(batch, self.device)
            with self.trainer.precision_plugin.forward_context():
                output = self.model(moved.inputs)
            counted = (moved.row >= 0) & (moved.target < output.output.shape[1])
            there = presence(moved.inputs)
            for name, logits in {"fused": output.output, **output.by_modality}.items():
                scored = counted & there[name] if name in there else counted
                rows = found.setdefault(name, torch.zeros(2, count, device=self.device))
                rows[0, moved.row[scored]] = cross_entropy(logits[scored].float(), moved.target[scored], reduction="none")
                rows[1, moved.row[scored]] = 1
        self.train(training)
        everywhere = {name: summed(self, both) for name, both in found.items()}
        return {name: torch.where(there > 0, loss, torch.nan) for name, (loss, there) in everywhere.items()}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.score("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.score("test", batch)

    def score(self, split: str, batch: Batch) -> None:
        counted = batch.row >= 0
        logits, target = self(batch.inputs)[counted], batch.target[counted]
        if not len(target):
            return
        self.metrics[split].update(logits.argmax(dim=1), target)  # type: ignore[operator]
        known = target < logits.shape[1]
        if bool(known.any()):
            self.mean_loss[split].update(cross_entropy(logits[known], target[known], reduction="none"))  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        self.log_scores("val")

    def on_test_epoch_end(self) -> None:
        self.log_scores("test")

    def log_scores(self, split: str) -> None:
        scores = self.metrics[split].compute() | {"loss": self.mean_loss[split].compute()}  # type: ignore[operator]
        # They are already summed over the ranks by the metrics themselves.
        self.log_dict({f"{split}/{name}": value for name, value in scores.items()}, rank_zero_only=False, sync_dist=False)
        self.metrics[split].reset()  # type: ignore[operator]
        self.mean_loss[split].reset()  # type: ignore[operator]


def true_class_scores(by_modality: dict[str, Tensor], target: Tensor, there: dict[str, Tensor]) -> dict[str, Tensor]:
    """By modality (n,), the probability that it gives to the true class of each of the n samples that have it."""
    picked = {name: logits.detach().float().softmax(dim=1).gather(1, target[:, None])[:, 0] for name, logits in by_modality.items()}
    return {name: probability[there[name]] for name, probability in picked.items()}


def balanced(data: ImageTextData, classes: int) -> Tensor:
    """(C,) weights: number of samples / (C * number of the class's samples)."""
    counts = torch.bincount(torch.from_numpy(data.splits["train"].samples.target), minlength=classes)
    return counts.sum() / (classes * counts.clamp(min=1))
