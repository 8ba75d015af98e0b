"""fusion benchmark memory: what a training batch of a recipe takes, with the activations of each part kept or computed again."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from lightning.fabric.utilities import move_data_to_device

from fusion.benchmarks.heads import device, peak_bytes, taking_turns
from fusion.console import aligned
from fusion.data import Batch, FusionData
from fusion.session import print_data_notes, quiet
from fusion.settings.parser import FusionCLI
from fusion.training import Engine


def benchmark_memory(arguments: Sequence[str], rounds: int) -> int:
    """Print peak memory and time of the forward and backward pass of a batch of the recipe; the parts checkpointed one by one, then all."""
    quiet()
    kept, data = made(arguments, [])
    print_data_notes(data)
    batch: Batch = move_data_to_device(next(iter(data.train_dataloader())), device())
    parts = [*kept.modalities, "head"]
    again = {f"{part} computed again": [part] for part in parts} | {"all computed again": parts}
    variants = {"all kept": kept} | {name: made(arguments, chosen)[0] for name, chosen in again.items()}
    engines = list(variants.values())
    ways: list[Callable[[], None]] = [partial(one_pass, engine, batch) for engine in engines]
    peaks = [peak_bytes(way, engine.zero_grad) for way, engine in zip(ways, engines, strict=True)]
    times = taking_turns(ways, rounds)
    rows = [["", "peak MiB", "of all kept", "ms", "of all kept"]]
    for name, peak, seconds in zip(variants, peaks, times, strict=True):
        ratio = statistics.median(a / b for a, b in zip(seconds, times[0], strict=True))
        cells = [f"{peak / 2**20:.1f}", f"{peak / peaks[0]:.2f}", f"{1000 * statistics.median(seconds):.1f}", f"{ratio:.2f}"]
        rows.append([name, *cells])
    print(f"{len(batch.target)} samples on {device()}, {torch.get_num_threads()} threads, median of {rounds} rounds\n\n{aligned(rows)}")
    return 0


def made(arguments: Sequence[str], checkpointed: list[str]) -> tuple[Engine, FusionData]:
    engine, data = FusionCLI([*arguments, f"--model.checkpoint_activations={checkpointed}"]).model_and_data()
    engine.build(data)
    return engine.to(device()).train(), data


def one_pass(engine: Engine, batch: Batch) -> None:
    engine.zero_grad()
    engine.loss(engine(batch.inputs), batch.target).backward()
