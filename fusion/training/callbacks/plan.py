"""The plan, printed before training starts: data, model, updates, devices."""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from fusion.console import print_rank_zero
from fusion.data.curriculum import LOSS
from fusion.data.module import SPLITS, FusionData
from fusion.data.sampler import GlobalBatches
from fusion.lightning_private import training_batches
from fusion.training.distributed.ddp import DDP
from fusion.training.engine import Engine

NOTABLE = 0.001  # share of unknown tokens
FEW_IMAGES = 8  # a device and batch, below which batch statistics are noisy


class Plan(Callback):
    """Prints the plan once everything is known: data, model, number of updates, devices."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero and isinstance(module, Engine):
            print_rank_zero("\n".join([*data_lines(trainer.datamodule), *model_lines(module), *training_lines(trainer, module)]))  # type: ignore[attr-defined]


def data_lines(data: FusionData) -> list[str]:
    lines = ["", "data"]
    for name in SPLITS:
        if name not in data.splits:
            lines.append(f"  {name:<6} none")
            continue
        split = data.splits[name]
        lines.append(f"  {name:<6} {len(split.table):>8,} samples: {data.processor.task.summary(split.table.labels)}")
        lines += [f"         {note}" for note in notes(data, name)]
    if data.shared_groups:
        lines.append(f"  {data.shared_groups:,} groups are in more than one split: the scores may be too high")
    if data.issues.dropped:
        lines.append(f"  {data.issues.summary()}")
    return lines


def notes(data: FusionData, name: str) -> list[str]:
    """Notes on a split: missing inputs, labels that are not in train, pairs shared with another split."""
    split, lines = data.splits[name], []
    for modality, column in split.table.inputs.items():
        missing = sum(cell is None for cell in column)
        if missing:
            lines.append(f"{missing:,} without {modality}")
    lines += [note for store in split.samples.stores.values() for note in store.notes]
    if split.unseen:
        lines.append(f"{split.unseen:,} ({split.unseen / len(split.table):.1%}) have labels that are not in train: always wrong")
    for (one, other), count in data.shared_inputs.items():
        if one == name and count:
            lines.append(f"{count:,} ({', '.join(split.table.inputs)}) pairs also occur in {other}")
    return lines


def model_lines(module: Engine) -> list[str]:
    assert module.model is not None
    lines = ["model"]
    for name, part in module.model.parts().items():
        trainable = sum(p.numel() for p in part.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in part.parameters()) - trainable
        spec = module.specs[name]["init"] if name in module.specs else {}
        of = spec.get("name") or spec.get("config", {}).get("model_type") or type(part).__name__
        lines.append(f"  {name:<6} {of}: {trainable:,} parameters" + (f", {frozen:,} frozen" if frozen else "") + precisions(part))
    if len(module.modalities) == 1:
        lines.append(f"  {module.modalities[0]} only: nothing to fuse, so the head is Unimodal")
    return lines


def precisions(part: nn.Module) -> str:
    """Description of the weights that are not float32, "" if there are none."""
    text = ""
    for dtype in sorted({p.dtype for p in part.parameters() if p.is_floating_point()} - {torch.float32}, key=str):
        name = str(dtype).removeprefix("torch.")
        trained = any(p.requires_grad for p in part.parameters() if p.dtype == dtype)
        text += f", {name} weights" + (", trained without float32 copies: small updates are lost" if trained else "")
    return text


def training_lines(trainer: Trainer, module: Engine) -> list[str]:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    batches = training_batches(trainer)
    requested = "" if batches.batch_size == data.batch_size else f" (requested {data.batch_size}; train has no more samples)"
    warmup, schedule = module.schedule.warmup_updates(module.horizon), type(module.schedule).__name__.lower()
    device = trainer.strategy.root_device
    an_epoch = -(-int(trainer.num_training_batches) // batches.accumulate)  # limited by trainer.limit_train_batches
    begun = f", {module.updates:,} of them done" if module.updates else ""
    return [
        "training",
        f"  global batch {describe_batch(batches)}{requested}",
        *statistics_lines(module, data, batches),
        f"  {module.horizon:,} updates, {an_epoch:,} an epoch{begun}; schedule {schedule}, {warmup:,} of warm-up",
        *schedule_lines(module),
        *curriculum_lines(data, module.horizon),
        *([f"  mixing: {module.mixer.settings}"] if module.mixer is not None else []),
        *([f"  teacher: {module.distillation.settings}"] if module.distillation is not None else []),
        f"  precision {trainer.precision}; {trainer.world_size} x {device.type}; strategy {type(trainer.strategy).__name__}",
        "",
    ]


def statistics_lines(module: Engine, data: FusionData, batches: GlobalBatches) -> list[str]:
    """A note where a trained batch normalisation gets few images a device for its statistics."""
    assert module.model is not None
    lines = []
    for name, store in data.splits["train"].samples.stores.items():
        encoder: Any = module.model.encoders[name]
        index = store.distinct()
        if index is None or not getattr(encoder, "has_batch_statistics", False) or encoder.frozen or encoder.has_synced_statistics:
            continue
        present = index[index >= 0]
        samples = batches.batch_size / (batches.world * batches.accumulate) * len(present) / len(index)
        # Shuffled by images, samples of the same image are adjacent, and a batch encodes the image once.
        images = samples * len(np.unique(present)) / len(present) if data.shuffle == "images" and len(present) else samples
        if images < FEW_IMAGES:
            synced = ", or --trainer.sync_batchnorm=true on GPUs" if isinstance(module.trainer.strategy, DDP) else ""
            lines.append(
                f"  note: batch normalisation sees about {max(1, round(images))} images a device at a time; statistics of so few are "
                f"noisy: use fewer devices, a larger data.batch_size{synced}"
            )
    return lines


def schedule_lines(module: Engine) -> list[str]:
    """A note where a resumed run has another number of updates, and its learning-rate schedule changes with it."""
    before, now, done = module.horizon_before, module.horizon, module.updates
    if before is None or before == now:
        return []
    schedules = [module.schedule, *(own for own in module.own_schedules if own is not None)]
    compared = range(0, min(before, now), max(1, before // 1000))
    if all(schedule.factor(u, before) == schedule.factor(u, now) for schedule in schedules for u in compared):
        return []
    rates = [module.peak * module.schedule.factor(done, horizon) for horizon in (before, now)]
    return [
        f"  note: {now:,} updates instead of {before:,}: the schedule differs from that of the run's start; at update {done:,} the "
        f"rate is {rates[1]:.2e} (it would have been {rates[0]:.2e})"
    ]


def curriculum_lines(data: FusionData, horizon: int) -> list[str]:
    c = data.curriculum
    if c is None:
        return []
    first = f", after {c.first_pass} epochs on all" if c.by == LOSS else ""
    return [f"  curriculum by {c.by}{first}: {c.start:.0%} of the samples at first, all from update {round(c.full_at * horizon):,}"]


def describe_batch(batches: GlobalBatches) -> str:
    """How a global batch is distributed over devices and accumulation."""
    devices = "1 device" if batches.world == 1 else f"{batches.world} devices"
    accumulated = "" if batches.accumulate == 1 else f" x {batches.accumulate} accumulated"
    return f"{batches.batch_size} = {devices}{accumulated} x {batches.batch_size // (batches.world * batches.accumulate)}"
