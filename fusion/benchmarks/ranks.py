"""fusion benchmark ranks: the same recipe on one process and on several of one core each: speed, bytes, losses, scores."""

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
    """What the runs of one variant gave."""

    rates: list[float] = field(default_factory=list)  # samples a second, of all its processes
    losses: list[float] = field(default_factory=list)  # by update
    by_epoch: list[float] = field(default_factory=list)
    sent: float | None = None  # bytes a rank an update
    accuracy: float | None = None


def benchmark_ranks(arguments: Sequence[str], ranks: int, rounds: int, compress: Sequence[str], curves: Path | None) -> int:
    """Run `fit` with these arguments on one process, on so many, also with each of the compressions, and as so many at once that share
    nothing, each with a rank's share of the batch; print how they compare. curves: a CSV file for all losses.
    """
    batch = FusionCLI(arguments).config.data.batch_size
    GlobalBatches(batch, batch, seed=0, world=ranks)  # which refuses a batch that they can't share
    ddp = ["--recipe", "engine/ddp", f"--trainer.devices={ranks}"]
    many = f"{ranks} ranks"
    variants = {
        ONE: ALONE,
        HALVES: [*ALONE, "--trainer.accumulate_grad_batches=2"],
        APART: [*ALONE, f"--data.batch_size={batch // ranks}"],
        many: ddp,
    } | {f"{many}, {how}": [*ddp, f"--trainer.strategy.init_args.compress={how}"] for how in compress}
    measured = {name: Measured() for name in variants}
    for _ in range(rounds):
        for name, options in variants.items():
            measure([*arguments, *options], ranks if name == APART else 1, measured[name])
    apart = measured.pop(APART)
    print(f"{compared(measured, apart)}\n\nloss by epoch")
    print(aligned([[name, *(f"{loss:.4f}" for loss in found.by_epoch)] for name, found in measured.items()]))
    efficiency = [both / alone for both, alone in zip(measured[many].rates, apart.rates, strict=True)]
    of_one = statistics.median(measured[many].rates) / statistics.median(measured[ONE].rates) / ranks
    print(
        f"\nefficiency of {ranks} ranks of one core each: {statistics.median(efficiency):.3f} of {ranks} runs at once that share nothing "
        f"({min(efficiency):.3f} to {max(efficiency):.3f}); {of_one:.3f} of {ranks} times one rank that takes the whole batch"
    )
    if curves is not None:
        with open(curves, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["update", *measured])
            losses = zip(*(found.losses for found in measured.values()), strict=True)
            writer.writerows([update, *of_all] for update, of_all in enumerate(losses))
    return 0


def compared(measured: dict[str, Measured], apart: Measured) -> str:
    """The table of the variants. Raises UserError where they can't be compared update by update."""
    counts = {name: len(found.losses) for name, found in measured.items()}
    if len(set(counts.values())) > 1:
        raise UserError(f"the updates differ: {counts}; shorten runs by --trainer.max_steps, which counts them, not batches")
    plain = measured[ONE]

    def speed(found: Measured) -> list[str]:
        each = statistics.median(found.rates)
        return [f"{each:,.0f}", f"{each / statistics.median(plain.rates):.2f}"]

    rows = [["", "samples/s", "against one rank", "sent bytes", "accuracy", "largest difference of the loss"]]
    for name, found in measured.items():
        sent = "" if found.sent is None else f"{found.sent:,.0f}"
        accuracy = "" if found.accuracy is None else f"{found.accuracy:.4f}"
        furthest = max(abs(a - b) for a, b in zip(found.losses, plain.losses, strict=True))
        rows.append([name, *speed(found), sent, accuracy, "" if found is plain else f"{furthest:.1e}"])
    return aligned([*rows, [APART, *speed(apart), "", "", ""]])


def measure(arguments: Sequence[str], at_once: int, into: Measured) -> None:
    """Run fit so often at once, each process with one thread. Raises UserError where one fails."""
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
        results = [json.loads((run / "results.json").read_text(encoding="utf-8")) for run in folders]
        # The median of the epochs but the first, which warms up.
        into.rates.append(sum(statistics.median(found["samples_per_s"][1:] or found["samples_per_s"]) for found in results))
        run = folders[0]
        rows = read_metrics(run / "metrics.csv")
        into.losses, into.by_epoch, sent = (column(rows, f"train/{name}") for name in ("loss_step", "loss_epoch", "sent_bytes"))
        into.sent = statistics.mean(sent) if sent else None
        into.accuracy = results[0]["test"].get("accuracy")


def column(rows: Sequence[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in rows if name in row]
