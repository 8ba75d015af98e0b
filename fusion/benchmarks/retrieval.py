"""fusion benchmark retrieval: memory and time of a contrastive update by accumulated batches, and of ranking a large test set."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from fusion.benchmarks.processes import in_new_process, memory_mib
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
            measured[name].append(in_new_process(update_cost, list(arguments), batch, device_batch))
    whole, _, one = measured.values()
    lines = [["an update of", "s", "of the first's (in rounds)", "peak MiB", "of the last's"]]
    for name, costs in measured.items():
        ratios = [own[0] / base[0] for own, base in zip(costs, whole, strict=True)]
        seconds, peak = (statistics.median(cost[i] for cost in costs) for i in (0, 1))
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        of_chunk = statistics.median(own[1] / base[1] for own, base in zip(costs, one, strict=True))
        lines.append([name, f"{seconds:.2f}", spread, f"{peak:.0f}", f"{of_chunk:.2f}"])
    print(f"median of {rounds} rounds, {torch.get_num_threads()} threads\n\n{aligned(lines)}\n")
    costs = [in_new_process(ranking_cost) for _ in range(rounds)]
    seconds, peak = (statistics.median(cost[i] for cost in costs) for i in (0, 1))
    print(f"ranks of {IMAGES:,} images x {IMAGES * CAPTIONS:,} captions, {DIM} wide: {seconds:.1f} s, {peak:.0f} MiB beyond them")
    return 0


def update_cost(arguments: list[str], batch: int, device_batch: int) -> tuple[float, float]:
    """Seconds of an update after the first, and peak memory in MiB beyond what the process used before training."""
    silence_harmless_warnings()
    off = [f"--trainer.{name}=false" for name in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")]
    own = [f"--data.batch_size={batch}", f"--data.device_batch_size={device_batch}", f"--trainer.max_steps={UPDATES}"]
    watch = Watch()
    model, data, trainer = FusionCLI([*arguments, *off, *own, "--trainer.limit_val_batches=0"]).make([watch])
    model.build(data)
    trainer.fit(model, datamodule=data)
    return watch.seconds, memory_mib("VmHWM") - watch.before


class Watch(Callback):
    """Times the updates after the first, and notes the memory in use before training."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.before, self.ends = memory_mib("VmRSS"), list[float]()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step > len(self.ends):
            self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Of an update."""
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)


def ranking_cost() -> tuple[float, float]:
    """Seconds, and peak memory in MiB beyond the embeddings."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(count, DIM, generator=generator) for count in (IMAGES, IMAGES * CAPTIONS))
    pairs = Pairs(left, right, torch.arange(IMAGES).repeat_interleave(CAPTIONS), torch.arange(IMAGES * CAPTIONS))
    before, began = memory_mib("VmRSS"), time.perf_counter()
    retrieval_ranks(pairs)
    return time.perf_counter() - began, memory_mib("VmHWM") - before
