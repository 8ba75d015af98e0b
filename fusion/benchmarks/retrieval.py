"""fusion benchmark retrieval: memory and time of a contrastive update by accumulated batches, and of ranking a large test set."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from fusion.benchmarks.processes import FREED_AT_ONCE, forget_peak_memory, in_new_process, memory_mib
from fusion.console import aligned
from fusion.session import silence_harmless_warnings
from fusion.settings.parser import FusionCLI
from fusion.tasks.metrics import Pairs, retrieval_ranks

IMAGES, CAPTIONS, DIM = 5000, 5, 256
UPDATES = 3  # of which the first is not timed


def benchmark_retrieval(arguments: Sequence[str], pairs: int, chunk: int, rounds: int) -> int:
    """Print both, with every measurement in a new process."""
    variants = {
        f"{pairs:,} pairs at once": (pairs, pairs),
        f"{pairs:,} in {pairs // chunk} accumulated": (pairs, chunk),
        f"{chunk} pairs": (chunk, chunk),
    }
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, (batch, device_batch) in variants.items():
            each = list(arguments), batch, device_batch
            seconds = in_new_process(update_seconds, *each)
            measured[name].append((seconds, in_new_process(update_peak, *each, environment=FREED_AT_ONCE)))
    whole, _, one = measured.values()
    lines = [["an update of", "s", "of the first's (in rounds)", "peak MiB", "of the last's"]]
    for name, costs in measured.items():
        ratios = [own[0] / base[0] for own, base in zip(costs, whole, strict=True)]
        seconds, peak = (statistics.median(cost[i] for cost in costs) for i in (0, 1))
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        of_chunk = statistics.median(own[1] / base[1] for own, base in zip(costs, one, strict=True))
        lines.append([name, f"{seconds:.2f}", spread, f"{peak:.0f}", f"{of_chunk:.2f}"])
    print(f"median of {rounds} rounds, {torch.get_num_threads()} threads\n\n{aligned(lines)}\n")
    costs = [in_new_process(ranking_cost, environment=FREED_AT_ONCE) for _ in range(rounds)]
    seconds, peak = (statistics.median(cost[i] for cost in costs) for i in (0, 1))
    print(f"ranks of {IMAGES:,} images x {IMAGES * CAPTIONS:,} captions, {DIM} wide: {seconds:.1f} s, {peak:.0f} MiB beyond them")
    return 0


def update_seconds(arguments: list[str], batch: int, device_batch: int) -> float:
    """Seconds of an update after the first."""
    ends = train(arguments, batch, device_batch).ends
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def update_peak(arguments: list[str], batch: int, device_batch: int) -> float:
    """Peak memory in MiB beyond what the process used before training."""
    watch = train(arguments, batch, device_batch)
    return memory_mib("VmHWM") - watch.before


def train(arguments: list[str], batch: int, device_batch: int) -> "Watch":
    """Train for a few updates, with nothing saved or scored."""
    silence_harmless_warnings()
    off = [f"--trainer.{name}=false" for name in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")]
    own = [f"--data.batch_size={batch}", f"--data.device_batch_size={device_batch}", f"--trainer.max_steps={UPDATES}"]
    watch = Watch()
    model, data, trainer = FusionCLI([*arguments, *off, *own, "--trainer.limit_val_batches=0"]).make([watch])
    model.build(data)
    trainer.fit(model, datamodule=data)
    return watch


class Watch(Callback):
    """Notes the memory in use before training, and when each update ends."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        forget_peak_memory()
        self.before, self.ends = memory_mib("VmRSS"), list[float]()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step > len(self.ends):
            self.ends.append(time.perf_counter())


def ranking_cost() -> tuple[float, float]:
    """Seconds, and peak memory in MiB beyond the embeddings."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(count, DIM, generator=generator) for count in (IMAGES, IMAGES * CAPTIONS))
    pairs = Pairs(left, right, torch.arange(IMAGES).repeat_interleave(CAPTIONS), torch.arange(IMAGES * CAPTIONS))
    before, began = memory_mib("VmRSS"), time.perf_counter()
    retrieval_ranks(pairs)
    return time.perf_counter() - began, memory_mib("VmHWM") - before
