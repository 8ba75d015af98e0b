"""The plan, told before training starts: data, model, updates, devices."""

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
FEW_PICTURES = 8  # of which batch statistics are taken


class Plan(Callback):
    """Prints the plan once everything is known, and keeps it: what is about to be trained, on what, for how long."""

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
    if data.ledger.issues:
        lines.append(f"  {data.ledger.summary()}")
    return lines


def notes(data: FusionData, name: str) -> list[str]:
    """What is special about a split, in words."""
    split, found = data.splits[name], []
    for modality, column in split.table.inputs.items():
        missing = sum(cell is None for cell in column)
        if missing:
            found.append(f"{missing:,} without {modality}")
    found += [note for store in split.samples.stores.values() for note in store.notes]
    if split.unseen:
        found.append(f"{split.unseen:,} ({split.unseen / len(split.table):.1%}) have labels that train never shows: always misses")
    for (one, other), count in data.shared_inputs.items():
        if one == name and count:
            found.append(f"{count:,} ({', '.join(split.table.inputs)}) pairs also occur in {other}")
    return found


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
        lines.append(f"  {module.modalities[0]} alone: nothing to fuse, so the head is Unimodal")
    return lines


def precisions(part: nn.Module) -> str:
    """Which weights are not float32, in words."""
    told = ""
    for dtype in sorted({p.dtype for p in part.parameters() if p.is_floating_point()} - {torch.float32}, key=str):
        name = str(dtype).removeprefix("torch.")
        trained = any(p.requires_grad for p in part.parameters() if p.dtype == dtype)
        told += f", {name} weights" + (", trained without float32 copies: small updates are lost" if trained else "")
    return told


def training_lines(trainer: Trainer, module: Engine) -> list[str]:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    batches = training_batches(trainer)
    asked = "" if batches.batch_size == data.batch_size else f" (asked {data.batch_size}; train has no more)"
    warmup, schedule = module.schedule.warmup_updates(module.horizon), type(module.schedule).__name__.lower()
    device = trainer.strategy.root_device
    an_epoch = -(-int(trainer.num_training_batches) // batches.accumulate)  # fewer than the data gives, by trainer.limit_train_batches
    begun = f", {module.updates:,} of them done" if module.updates else ""
    return [
        "training",
        f"  global batch {shares(batches)}{asked}",
        *statistics_lines(module, data, batches),
        f"  {module.horizon:,} updates, {an_epoch:,} an epoch{begun}; schedule {schedule}, {warmup:,} of warm-up",
        *schedule_lines(module),
        *curriculum_lines(data, module.horizon),
        f"  precision {trainer.precision}; {trainer.world_size} x {device.type}; strategy {type(trainer.strategy).__name__}",
        "",
    ]


def statistics_lines(module: Engine, data: FusionData, batches: GlobalBatches) -> list[str]:
    """That batch normalisation has few pictures to take its statistics of, where it has."""
    assert module.model is not None
    found = []
    for name, store in data.splits["train"].samples.stores.items():
        encoder: Any = module.model.encoders[name]
        rows = store.distinct()
        if rows is None or not getattr(encoder, "has_batch_statistics", False) or encoder.frozen or encoder.has_synced_statistics:
            continue
        shown = rows[rows >= 0]
        samples = batches.batch_size / (batches.world * batches.accumulate) * len(shown) / len(rows)
        # Samples that share a picture stand next to each other, or anywhere.
        pictures = samples * len(np.unique(shown)) / len(shown) if data.shuffle == "images" and len(shown) else samples
        if pictures < FEW_PICTURES:
            synced = ", or --trainer.sync_batchnorm=true on GPUs" if isinstance(module.trainer.strategy, DDP) else ""
            found.append(
                f"  note: batch normalisation sees about {max(1, round(pictures))} pictures a device at a time; statistics of so few are "
                f"noise: fewer devices, a larger data.batch_size{synced}"
            )
    return found


def schedule_lines(module: Engine) -> list[str]:
    """That a resumed run's schedule has become another, where its end did and the rate depends on it."""
    before, now, done = module.horizon_before, module.horizon, module.updates
    if before is None or before == now:
        return []
    schedules = [module.schedule, *(own for own in module.own_schedules if own is not None)]
    looked_at = range(0, min(before, now), max(1, before // 1000))
    if all(schedule.factor(u, before) == schedule.factor(u, now) for schedule in schedules for u in looked_at):
        return []
    rates = [module.peak * module.schedule.factor(done, horizon) for horizon in (before, now)]
    return [
        f"  note: {now:,} updates where {before:,} were planned: another schedule than the run began with; at update {done:,} the rate is "
        f"{rates[1]:.2e} (it would have been {rates[0]:.2e})"
    ]


def curriculum_lines(data: FusionData, horizon: int) -> list[str]:
    c = data.curriculum
    if c is None:
        return []
    first = f", after {c.first_pass} epochs on all" if c.by == LOSS else ""
    return [f"  curriculum by {c.by}{first}: {c.start:.0%} of the samples at first, all from update {round(c.full_at * horizon):,}"]


def shares(batches: GlobalBatches) -> str:
    """How a global batch is shared out, in words."""
    devices = "1 device" if batches.world == 1 else f"{batches.world} devices"
    accumulated = "" if batches.accumulate == 1 else f" x {batches.accumulate} accumulated"
    return f"{batches.batch_size} = {devices}{accumulated} x {batches.batch_size // (batches.world * batches.accumulate)}"
