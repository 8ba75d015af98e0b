"""The task of telling one class of several."""

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from fusion.data.module import ImageTextData
from fusion.data.processor import Processor
from fusion.data.samples import Batch
from fusion.encoders import Encoder
from fusion.errors import UserError, nearest
from fusion.heads import CrossAttention, FusionHead, Unimodal
from fusion.model import FusionModel, factory_parts
from fusion.training.metrics import per_split
from fusion.training.schedules import Constant, Schedule

FORMAT = 1
ADAMW = partial(AdamW, lr=1e-3, weight_decay=0.01)


class Classification(LightningModule):
    """Train a FusionModel to tell one class of several, by cross entropy.

    Args:
        image: makes the image encoder.
        text: makes the text encoder.
        head: makes the head that joins them; it gets the encoders' widths and the number of classes when these are known.
        modalities: which to use, in the head's order; with one alone the head is Unimodal.
        optimizer: makes the optimiser; its weight decay is left out for biases, norms and other vectors.
        schedule: the learning rate over the updates; constant if none.
        label_smoothing: share of each target spread over all classes (Szegedy et al., 2016).
        class_weights: "balanced" weighs each class by the inverse of its frequency in train.
    """

    weight: Tensor | None

    def __init__(
        self,
        image: Callable[[], Encoder] | None = None,
        text: Callable[[], Encoder] | None = None,
        head: Callable[[dict[str, int], int], FusionHead] = CrossAttention,
        modalities: Sequence[str] = ("image", "text"),
        optimizer: OptimizerCallable = ADAMW,
        schedule: Schedule | None = None,
        label_smoothing: float = 0.0,
        class_weights: Literal["none", "balanced"] = "none",
    ) -> None:
        super().__init__()
        factories = {"image": image, "text": text}
        for name in modalities:
            if name not in factories:
                raise UserError(f"model.modalities: unknown modality '{name}'. {nearest(name, factories)}")
            if factories[name] is None:
                raise UserError(f"model.modalities asks for '{name}', but model.{name} names no encoder")
        if not modalities or len(set(modalities)) < len(modalities):
            raise UserError(f"model.modalities is {list(modalities)}; expected image, text or both, each once")
        self.modalities = list(modalities)
        self.factories: dict[str, Callable[[], Encoder]] = {name: factories[name] for name in modalities}  # type: ignore[misc]
        self.head_factory: Callable[..., FusionHead] = head if len(modalities) > 1 else Unimodal
        self.make_optimizer, self.schedule = optimizer, schedule or Constant()
        self.label_smoothing, self.class_weights = label_smoothing, class_weights
        self.updates = 0
        self.scheduled = 0
        self.model: FusionModel | None = None

    # Built when the data is known.

    def build(self, data: ImageTextData) -> FusionModel:
        """Load the data for the encoders, then make the head for the classes found. Done once."""
        if self.model is None:
            encoders = {name: make() for name, make in self.factories.items()}
            data.load(encoders)
            self.specs: dict[str, dict[str, Any]] = {
                name: {"class": type_path(encoder), "init": encoder.spec()} for name, encoder in encoders.items()
            }
            self.processor: Processor = data.processor
            classes = self.processor.classes
            self.model = FusionModel.build(encoders, self.head_factory, len(classes))
            scored = {name: split for name, split in data.splits.items() if name != "train"}
            self.metrics = per_split(len(classes), {name: split.unseen_labels > 0 for name, split in scored.items()})
            self.mean_loss = nn.ModuleDict({name: MeanMetric() for name in scored})
            self.register_buffer("weight", balanced(data, len(classes)) if self.class_weights == "balanced" else None, persistent=False)
        return self.model

    def setup(self, stage: str) -> None:
        self.build(self.trainer.datamodule)  # type: ignore[attr-defined]

    # Steps.

    def forward(self, inputs: dict[str, Any]) -> Tensor:  # (B, C)
        assert self.model is not None
        return self.model(inputs).output

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(logits, target, weight=self.weight, label_smoothing=self.label_smoothing)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = self(batch.inputs)
        loss = self.loss(logits, batch.target)
        hits = (logits.detach().argmax(dim=1) == batch.target).float().mean()
        many = self.trainer.world_size > 1
        self.log_dict(
            {"train/loss": loss.detach(), "train/accuracy": hits}, on_step=True, on_epoch=True, batch_size=len(batch.target), sync_dist=many
        )
        return loss

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

    # Optimiser and schedule, by updates really made.

    def configure_optimizers(self) -> Any:
        optimizer = self.new_optimizer()
        # GradScaler doesn't call the optimiser when it skips an update: counting its steps counts true updates.
        optimizer.register_step_post_hook(self.count_update)
        horizon = self.trainer.estimated_stepping_batches
        if horizon == float("inf"):
            raise UserError("the schedule needs an end: give --trainer.max_epochs or --trainer.max_steps")
        self.horizon = int(horizon)
        scheduler = LambdaLR(optimizer, lambda update: self.schedule.factor(update, self.horizon))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def new_optimizer(self) -> Optimizer:
        """As the recipe says; the model must be attached to its trainer."""
        assert self.model is not None
        return self.make_optimizer(parameter_groups(self.model), **self.fused())

    def fused(self) -> dict[str, bool]:
        """fused=True where the optimiser has it and the recipe doesn't say: one kernel for all parameters, several times faster for many
        small ones. Not in mixed precision, where a fused optimiser unscales by itself, too late to clip.
        """
        cls, options = factory_parts(self.make_optimizer, Optimizer)
        mixed = isinstance(self.trainer.precision_plugin, MixedPrecision)
        if mixed and options.get("fused") and self.trainer.gradient_clip_val:
            raise UserError(
                "a fused optimiser can't clip gradients in mixed precision: leave out --model.optimizer.init_args.fused, "
                "or --trainer.gradient_clip_val=null"
            )
        return {"fused": True} if "fused" in signature(cls).parameters and options.get("fused") is None and not mixed else {}

    def count_update(self, optimizer: Optimizer, *_: Any) -> None:
        # A fused optimiser is called even then, and skips the update inside.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not bool(found_inf):
            self.updates += 1

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if self.updates > self.scheduled:
            scheduler.step()
            self.scheduled = self.updates

    # What a checkpoint holds beside Lightning's own: all that prediction needs, as plain data.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        head, options = factory_parts(self.head_factory, FusionHead)
        checkpoint["fusion"] = {
            "format": FORMAT,
            "task": "classification",
            "encoders": self.specs,
            "head": {"class": f"{head.__module__}.{head.__qualname__}", "init": options},
            "processor": self.processor.state(),
            "updates": self.updates,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.updates = self.scheduled = checkpoint["fusion"]["updates"]


def type_path(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def balanced(data: ImageTextData, classes: int) -> Tensor:
    """(C,) weights: number of samples / (C * number of the class's samples)."""
    counts = torch.bincount(torch.from_numpy(data.splits["train"].samples.target), minlength=classes)
    return counts.sum() / (classes * counts.clamp(min=1))


def parameter_groups(model: FusionModel) -> list[dict[str, Any]]:
    """Hidden matrices; embeddings, output layers and other tables; vectors and scalars (norms, biases, gates), which get no weight decay.

    `hidden` says which are which to optimisers that treat hidden matrices in their own way (Muon); others pay it no heed.
    """
    mapping = {module.weight for module in model.modules() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)}
    hidden = mapping - {layer.weight for layer in model.head.output_layers()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.dim() > 1]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in matrices if p in hidden], "hidden": True},
        {"params": [p for p in matrices if p not in hidden], "hidden": False},
        {"params": [p for p in trainable if p.dim() <= 1], "hidden": False, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
