"""fusion benchmark ranks: compares one process with several of one core each: speed, bytes sent, losses and scores."""

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fusion.console import aligned
from fusion.data.sampler import GlobalBatches
from fusion.errors import UserError
from fusion.settings.parser import FusionCLI
from fusion.training.callbacks.run_folder import read_metrics

ALONE = ["--trainer.devices=1", "--trainer.strategy=auto"]
ONE, HALVES, APART = "one rank", "one rank, accumulation x 2", "runs of one rank at once"


@dataclass
class Measured:
    """The measurements of the runs of one variant."""

    rates: list[float] = field(default_factory=list)  # samples per second of all processes together, by round
    losses: list[float] = field(default_factory=list)  # by update
    by_epoch: list[float] = field(default_factory=list)
    sent: float | None = None  # bytes per rank and update
    accuracy: float | None = None


def benchmark_ranks(arguments: Sequence[str], ranks: int, rounds: int, compress: Sequence[str], curves: Path | None) -> int:
    """Run `fit` with these arguments on one process, on several ranks without and with each compression, and as several independent runs at
    once, each with one rank's share of the batch; print a comparison. curves: CSV file for all losses.
    """
    batch = FusionCLI(arguments).config.data.batch_size
    GlobalBatches(batch, batch, seed=0, world=ranks)  # rejects a batch that can't be distributed evenly
    ddp = ["--recipe", "engine/ddp", f"--trainer.devices={ranks}"]
    ddp_name = f"{ranks} ranks"
    variants = {
        ONE: ALONE,
        HALVES: [*ALONE, "--trainer.accumulate_grad_batches=2"],
        APART: [*ALONE, f"--data.batch_size={batch // ranks}"],
        ddp_name: ddp,
    } | {f"{ddp_name}, {how}": [*ddp, f"--trainer.strategy.init_args.compress={how}"] for how in compress}
    measured = {name: Measured() for name in variants}
    for _ in range(rounds):
        for name, options in variants.items():
            measure([*arguments, *options], ranks if name == APART else 1, measured[name])
    apart = measured.pop(APART)
    print(f"{compared(measured, apart)}\n\nloss by epoch")
    print(aligned([[name, *(f"{loss:.4f}" for loss in variant.by_epoch)] for name, variant in measured.items()]))
    efficiency = [both / alone for both, alone in zip(measured[ddp_name].rates, apart.rates, strict=True)]
    of_one = statistics.median(measured[ddp_name].rates) / statistics.median(measured[ONE].rates) / ranks
    print(
        f"\nefficiency of {ranks} ranks of one core each: {statistics.median(efficiency):.3f} of {ranks} independent runs at once "
        f"({min(efficiency):.3f} to {max(efficiency):.3f}); {of_one:.3f} of {ranks} times one rank with the whole batch"
    )
    if curves is not None:
        with open(curves, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["update", *measured])
            losses = zip(*(variant.losses for variant in measured.values()), strict=True)
            writer.writerows([update, *by_variant] for update, by_variant in enumerate(losses))
    return 0


def compared(measured: dict[str, Measured], apart: Measured) -> str:
    """A table of the variants. Raises UserError if they made different numbers of updates."""
    counts = {name: len(variant.losses) for name, variant in measured.items()}
    if len(set(counts.values())) > 1:
        raise UserError(f"numbers of updates differ: {counts}; shorten runs with --trainer.max_steps, which counts updates, not batches")
    plain = measured[ONE]

    def speed(variant: Measured) -> list[str]:
        rate = statistics.median(variant.rates)
        return [f"{rate:,.0f}", f"{rate / statistics.median(plain.rates):.2f}"]

    lines = [["", "samples/s", "against one rank", "sent bytes", "accuracy", "largest difference of the loss"]]
    for name, variant in measured.items():
        sent = "" if variant.sent is None else f"{variant.sent:,.0f}"
        accuracy = "" if variant.accuracy is None else f"{variant.accuracy:.4f}"
        furthest = max(abs(a - b) for a, b in zip(variant.losses, plain.losses, strict=True))
        lines.append([name, *speed(variant), sent, accuracy, "" if variant is plain else f"{furthest:.1e}"])
    return aligned([*lines, [APART, *speed(apart), "", "", ""]])


def measure(arguments: Sequence[str], at_once: int, into: Measured) -> None:
    """Run fit in so many processes at once, with one thread each. Raises UserError if one fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "fusion", "fit", *arguments, "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1"]
        running = [
            subprocess.Popen(
                [*words, f"--runs={folder}/{number}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
            )
            for number in range(at_once)
        ]
        for process in running:
            output = process.communicate()[0]
            if process.returncode:
                raise UserError(f"a run ended with status {process.returncode}: {output.strip().splitlines()[-1]}")
        folders = [next(Path(folder).glob(f"{number}/*/*")) for number in range(at_once)]
        results, timings = (
            [json.loads((run / f"{name}.json").read_text(encoding="utf-8")) for run in folders] for name in ("results", "timing")
        )
        # The median of the epochs, without the first, which includes warm-up.
        into.rates.append(sum(statistics.median(timing["samples_per_s"][1:] or timing["samples_per_s"]) for timing in timings))
        run = folders[0]
        records = read_metrics(run / "metrics.csv")
        into.losses, into.by_epoch, sent = (column(records, f"train/{name}") for name in ("loss_step", "loss_epoch", "sent_bytes"))
        into.sent = statistics.mean(sent) if sent else None
        into.accuracy = results[0]["test"].get("accuracy")


def column(records: Sequence[dict[str, str]], name: str) -> list[float]:
    return [float(record[name]) for record in records if name in record]
