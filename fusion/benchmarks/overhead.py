"""What the fit loop costs beside bare PyTorch loops, in turns in one process."""

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
from fusion.session import quiet, standing_callbacks
from fusion.settings.parser import FusionCLI
from fusion.training import Engine
from fusion.training.callbacks.run_folder import RunFolder


def benchmark_overhead(arguments: Sequence[str], rounds: int, updates: int) -> int:
    """Print samples per second of the three loops and the ratios round by round."""
    quiet()
    cli = FusionCLI(arguments)
    seed_everything(cli.config.seed_everything)
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock()
        run = RunFolder(Path(folder), cli.resolved(), None)
        short = {"max_epochs": rounds, "limit_train_batches": updates, "limit_val_batches": 0}
        for option, value in short.items():
            cli.config.trainer[option] = value
        model, data, trainer = cli.make([clock, *standing_callbacks(run, cli.config.seed_everything)])
        model.build(data)
        clock.between = lambda: bare_rounds(model, data, updates, cli.config.trainer.gradient_clip_val, clock)
        trainer.fit(model, datamodule=data)
    batch = data.batch_size
    names = {"fit": "the whole fit loop", "loader": "bare loop, same loader", "memory": "bare loop, batches in memory"}
    rows = [["", "samples/s", "fit against it (median of rounds)"]]
    for key, name in names.items():
        rate = statistics.median(updates * batch / s for s in clock.seconds[key])
        ratios = [other / own for other, own in zip(clock.seconds[key], clock.seconds["fit"], strict=True)]
        spread = f"{statistics.median(ratios):.3f}  ({min(ratios):.3f} to {max(ratios):.3f})"
        rows.append([name, f"{rate:,.0f}", "" if key == "fit" else spread])
    print(f"\n{rounds} rounds of {updates} updates of {batch} samples, {torch.get_num_threads()} threads\n\n{aligned(rows)}")
    return 0


class Clock(Callback):
    """Times the fit loop's batches of each epoch, and after each epoch lets the other loops have their turn."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {"fit": [], "loader": [], "memory": []}
        self.between: Callable[[], None] = lambda: None

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.began = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.seconds["fit"].append(time.perf_counter() - self.began)
        self.between()


def bare_rounds(model: Engine, data: FusionData, updates: int, clip: float | None, clock: Clock) -> None:
    """One round of each bare loop, on the same model."""
    optimizer = model.new_optimizer()
    held: list[Batch] = list(islice(data.train_dataloader(), updates))
    # The order changes from round to round, so that a drift of the machine's speed favours none.
    turns: list[tuple[str, Callable[[], Iterable[Any]]]] = [
        ("loader", lambda: islice(data.train_dataloader(), updates)),
        ("memory", lambda: held),
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
