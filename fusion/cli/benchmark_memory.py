"""fusion benchmark memory: what a training batch of a recipe takes, with the activations of each part kept or computed again."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from lightning.fabric.utilities import move_data_to_device
from torch.nn.functional import cross_entropy

from fusion.cli.benchmark_heads import device, peak_bytes, taking_turns
from fusion.cli.fit import build, quiet
from fusion.cli.parser import FusionCLI
from fusion.cli.tables import aligned
from fusion.data import Batch
from fusion.training import Task


def benchmark_memory(arguments: Sequence[str], rounds: int) -> int:
    """Print peak memory and time of the forward and backward pass of a batch of the recipe; the parts checkpointed one by one, then all."""
    quiet()
    told = FusionCLI(arguments).model_and_data()
    build(*told)
    batch: Batch = move_data_to_device(next(iter(told[1].train_dataloader())), device())
    parts = [*told[0].modalities, "head"]
    variants: dict[str, list[str]] = {"all kept": []} | {f"{part} computed again": [part] for part in parts} | {"all computed again": parts}
    tasks = [made(arguments, chosen) for chosen in variants.values()]
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


def made(arguments: Sequence[str], checkpointed: list[str]) -> Task:
    task, data = FusionCLI([*arguments, f"--model.checkpoint_activations={checkpointed}"]).model_and_data()
    task.build(data)
    return task.to(device()).train()


def one_pass(task: Task, batch: Batch) -> None:
    assert task.model is not None
    task.zero_grad()
    cross_entropy(task.model(batch.inputs).output, batch.target).backward()
