"""fusion benchmark memory: what a training batch of a recipe takes, with the activations of each part kept or computed again."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from lightning.fabric.utilities import move_data_to_device

from fusion.benchmarks.heads import device, peak_bytes, taking_turns
from fusion.console import aligned
from fusion.data import Batch, ImageTextData
from fusion.session import print_data_notes, quiet
from fusion.settings.parser import FusionCLI
from fusion.training import Classification


def benchmark_memory(arguments: Sequence[str], rounds: int) -> int:
    """Print peak memory and time of the forward and backward pass of a batch of the recipe; the parts checkpointed one by one, then all."""
    quiet()
    kept, data = made(arguments, [])
    print_data_notes(data)
    batch: Batch = move_data_to_device(next(iter(data.train_dataloader())), device())
    parts = [*kept.modalities, "head"]
    again = {f"{part} computed again": [part] for part in parts} | {"all computed again": parts}
    variants = {"all kept": kept} | {name: made(arguments, chosen)[0] for name, chosen in again.items()}
    tasks = list(variants.values())
    ways: list[Callable[[], None]] = [partial(one_pass, task, batch) for task in tasks]
    peaks = [peak_bytes(way, task.zero_grad) for way, task in zip(ways, tasks, strict=True)]
    times = taking_turns(ways, rounds)
    rows = [["", "peak MiB", "of all kept", "ms", "of all kept"]]
    for name, peak, seconds in zip(variants, peaks, times, strict=True):
        ratio = statistics.median(a / b for a, b in zip(seconds, times[0], strict=True))
        cells = [f"{peak / 2**20:.1f}", f"{peak / peaks[0]:.2f}", f"{1000 * statistics.median(seconds):.1f}", f"{ratio:.2f}"]
        rows.append([name, *cells])
    print(f"{len(batch.target)} samples on {device()}, {torch.get_num_threads()} threads, median of {rounds} rounds\n\n{aligned(rows)}")
    return 0


def made(arguments: Sequence[str], checkpointed: list[str]) -> tuple[Classification, ImageTextData]:
    task, data = FusionCLI([*arguments, f"--model.checkpoint_activations={checkpointed}"]).model_and_data()
    task.build(data)
    return task.to(device()).train(), data


def one_pass(task: Classification, batch: Batch) -> None:
    task.zero_grad()
    task.loss(task(batch.inputs), batch.target).backward()
