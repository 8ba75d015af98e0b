"""fusion benchmark overhead: cost of the fit loop compared with bare PyTorch loops, alternating in one process."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.nn.utils import clip_grad_norm_

from fusion.console import aligned
from fusion.data import Batch, FusionData
from fusion.session import silence_harmless_warnings, standing_callbacks
from fusion.settings.parser import FusionCLI
from fusion.training import Engine
from fusion.training.callbacks.run_folder import RunFolder


def benchmark_overhead(arguments: Sequence[str], rounds: int, updates: int) -> int:
    """Print samples per second of the three loops, and their ratios over the rounds."""
    silence_harmless_warnings()
    cli = FusionCLI(arguments)
    seed_everything(cli.config.seed_everything)
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock()
        run = RunFolder(Path(folder), cli.resolved(), None)
        limits = {"max_epochs": rounds, "limit_train_batches": updates, "limit_val_batches": 0}
        for option, value in limits.items():
            cli.config.trainer[option] = value
        model, data, trainer = cli.make([clock, *standing_callbacks(run, cli.config.seed_everything)])
        model.build(data)
        clock.after_epoch = lambda: bare_rounds(model, data, updates, cli.config.trainer.gradient_clip_val, clock)
        trainer.fit(model, datamodule=data)
    batch = data.batch_size
    names = {"fit": "the whole fit loop", "loader": "bare loop, same loader", "memory": "bare loop, batches in memory"}
    lines = [["", "samples/s", "fit against it (median of rounds)"]]
    for key, name in names.items():
        rate = statistics.median(updates * batch / s for s in clock.seconds[key])
        ratios = [bare / fit for bare, fit in zip(clock.seconds[key], clock.seconds["fit"], strict=True)]
        spread = f"{statistics.median(ratios):.3f}  ({min(ratios):.3f} to {max(ratios):.3f})"
        lines.append([name, f"{rate:,.0f}", "" if key == "fit" else spread])
    print(f"\n{rounds} rounds of {updates} updates of {batch} samples, {torch.get_num_threads()} threads\n\n{aligned(lines)}")
    return 0


class Clock(Callback):
    """Times the fit loop's epochs, and after each epoch runs the other loops."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {"fit": [], "loader": [], "memory": []}
        self.after_epoch: Callable[[], None] = lambda: None

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.began = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.seconds["fit"].append(time.perf_counter() - self.began)
        self.after_epoch()


def bare_rounds(model: Engine, data: FusionData, updates: int, clip: float | None, clock: Clock) -> None:
    """One round of each bare loop, on the same model."""
    optimizer = model.new_optimizer()
    in_memory: list[Batch] = list(islice(data.train_dataloader(), updates))
    # The order alternates between rounds, so that a drift of the machine's speed favours neither.
    turns: list[tuple[str, Callable[[], Iterable[Any]]]] = [
        ("loader", lambda: islice(data.train_dataloader(), updates)),
        ("memory", lambda: in_memory),
    ]
    for name, batches in turns if len(clock.seconds["fit"]) % 2 else reversed(turns):
        began = time.perf_counter()
        for batch in batches():
            optimizer.zero_grad()
            loss = model.loss(model(batch.inputs), batch.target)
            loss.backward()
            if clip:
                clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        clock.seconds[name].append(time.perf_counter() - began)
