"""fusion benchmark memory: peak memory and time of a training batch, with the activations of each part stored or recomputed."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from lightning.fabric.utilities import move_data_to_device

from fusion.benchmarks.heads import alternate, device, peak_bytes
from fusion.console import aligned
from fusion.data import Batch, FusionData
from fusion.session import print_data_notes, silence_harmless_warnings
from fusion.settings.parser import FusionCLI
from fusion.training import Engine


def benchmark_memory(arguments: Sequence[str], rounds: int) -> int:
    """Print peak memory and time of the forward and backward pass of a batch, with no part checkpointed, each part alone, and all parts."""
    silence_harmless_warnings()
    stored, data = build(arguments, [])
    print_data_notes(data)
    batch: Batch = move_data_to_device(next(iter(data.train_dataloader())), device())
    parts = [*stored.modalities, "head"]
    recomputed = {f"{part} recomputed": [part] for part in parts} | {"all recomputed": parts}
    variants = {"all stored": stored} | {name: build(arguments, chosen)[0] for name, chosen in recomputed.items()}
    engines = list(variants.values())
    passes: list[Callable[[], None]] = [partial(one_pass, engine, batch) for engine in engines]
    peaks = [peak_bytes(one, engine.zero_grad) for one, engine in zip(passes, engines, strict=True)]
    times = alternate(passes, rounds)
    lines = [["", "peak MiB", "/ all stored", "ms", "/ all stored"]]
    for name, peak, seconds in zip(variants, peaks, times, strict=True):
        ratio = statistics.median(a / b for a, b in zip(seconds, times[0], strict=True))
        entries = [f"{peak / 2**20:.1f}", f"{peak / peaks[0]:.2f}", f"{1000 * statistics.median(seconds):.1f}", f"{ratio:.2f}"]
        lines.append([name, *entries])
    print(f"{len(batch.target)} samples on {device()}, {torch.get_num_threads()} threads, median of {rounds} rounds\n\n{aligned(lines)}")
    return 0


def build(arguments: Sequence[str], checkpointed: list[str]) -> tuple[Engine, FusionData]:
    engine, data = FusionCLI([*arguments, f"--model.checkpoint_activations={checkpointed}"]).model_and_data()
    engine.build(data)
    return engine.to(device()).train(), data


def one_pass(engine: Engine, batch: Batch) -> None:
    engine.zero_grad()
    engine.loss(engine(batch.inputs), batch.target).backward()
