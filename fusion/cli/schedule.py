"""fusion schedule: the learning rate of a recipe over its updates, without training."""

import csv
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from fusion.cli.options import Options
from fusion.data.sampler import GlobalBatches, planned_updates
from fusion.model import factory_parts
from fusion.session import print_data_notes, silence_harmless_warnings
from fusion.settings.parser import FusionCLI, accumulate
from fusion.training import Engine, Rate
from fusion.training.callbacks.plan import describe_batch

WIDTH, HEIGHT = 72, 10
LEVELS = " ▁▂▃▄▅▆▇█"


def schedule(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    words = list(arguments)
    if not words or words[0] in ("-h", "--help"):
        print(
            "usage: fusion schedule [--csv FILE] --recipe NAME [any option of fit]\n\n"
            "Prints a recipe's plan and plots its learning rate over the updates; --csv also writes the rate of every update.\n"
            "The devices need not be available: --trainer.devices=64 --trainer.num_nodes=8 shows the schedule for them."
        )
        return 0
    parser = Options("fusion schedule", "")
    parser.add_argument("--csv", type=Path)
    options, rest = parser.parse_known_args(words)
    silence_harmless_warnings()
    cli = FusionCLI(rest)
    engine, data = cli.model_and_data()
    engine.build(data)
    print_data_notes(data)
    devices = world(cli.config.trainer)
    accumulated = accumulate(cli.config, data, devices)
    batches = GlobalBatches(len(data.splits["train"].samples), data.batch_size, seed=0, world=devices, accumulate=accumulated)
    epoch, horizon = planned_updates(cli.config.trainer, batches)
    count = len(data.splits["train"].samples)
    lines = [f"{count:,} samples, global batch {describe_batch(batches)}: {epoch:,} updates an epoch, {horizon:,} in all"]
    curves = {part: curve(engine, rate, horizon) for part, rate in rates(engine).items()}
    for part, values in curves.items():
        lines += ["", f"{part}: {description(engine, rates(engine)[part], horizon)}", *plot(values)]
    print("\n".join(lines))
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["update", *curves])
            writer.writerows([update, *values] for update, *values in zip(range(horizon), *curves.values(), strict=True))
    return 0


def world(trainer: Any) -> int:
    """The number of processes that the recipe requests; devices left to the machine ("auto") count as one."""
    devices = trainer.devices
    if isinstance(devices, str):
        devices = len(devices.split(",")) if "," in devices else int(devices) if devices.isdigit() else 1
    count = len(devices) if isinstance(devices, list) else max(1, devices)
    return count * trainer.num_nodes


def rates(engine: Engine) -> dict[str, Rate]:
    """The rate of each part of the model; one for the whole model if the recipe sets none."""
    return {part: engine.rates.get(part, Rate()) for part in (*engine.modalities, "head")} if engine.rates else {"all of the model": Rate()}


def peak(engine: Engine, rate: Rate) -> float:
    cls, options = factory_parts(engine.make_optimizer, Optimizer)
    return float(options.get("lr", signature(cls).parameters["lr"].default)) * rate.factor


def curve(engine: Engine, rate: Rate, horizon: int) -> list[float]:
    """The learning rate of each update."""
    engine.horizon = horizon
    return [peak(engine, rate) * engine.factor(rate.schedule, update) for update in range(horizon)]


def description(engine: Engine, rate: Rate, horizon: int) -> str:
    warmup = engine.schedule.warmup_updates(horizon)
    kinds = " x ".join(type(s).__name__ for s in (engine.schedule, rate.schedule) if s is not None)
    decay = f"; each layer {rate.layer_decay:g} times the one after it" if rate.layer_decay != 1 else ""
    return f"{kinds}, {warmup:,} updates of warm-up, peak {peak(engine, rate):g}{decay}"


def plot(values: Sequence[float]) -> list[str]:
    """A plot of the values over the updates, as lines of block characters."""
    width = min(WIDTH, len(values))
    columns = [values[round(i * (len(values) - 1) / max(1, width - 1))] for i in range(width)]
    top = max(values) or 1.0
    lines = []
    for level in reversed(range(HEIGHT)):
        eighths = [min(8, max(0, round(8 * (value / top * HEIGHT - level)))) for value in columns]
        label = f"{top * (level + 1) / HEIGHT:>9.2e} " if level % 3 == 0 or level == HEIGHT - 1 else " " * 10
        lines.append(label + "│" + "".join(LEVELS[e] for e in eighths))
    return [*lines, " " * 10 + "└" + "─" * width, " " * 11 + f"0{len(values):>{width - 1},} updates"]
