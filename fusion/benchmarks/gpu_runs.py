"""Checks of `fusion benchmark gpu` that run the command: losses compared with the CPU's, kills, and several ranks."""

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fusion.benchmarks.findings import Finding
from fusion.errors import LOST_RANK
from fusion.training.callbacks.run_folder import METRICS, read_metrics

TIMEOUT_S = 300
ADAMW = ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.init_args.lr=0.0015"]
BF16 = ["--trainer.precision=bf16-mixed"]
FP16 = ["--recipe", "engine/amp"]


@dataclass
class Runs:
    """Short runs of quickstart, each in a folder of its own."""

    folder: Path
    scenes: int
    on_gpu: bool

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"FUSION_CACHE": str(self.folder / "cache"), "TOKENIZERS_PARALLELISM": "false"}

    @property
    def short(self) -> list[str]:
        """Options of every run: the loss of each update is logged, and validation is one batch."""
        data = [f"--data.preparer.init_args.scenes={self.scenes}", "--data.batch_size=64"]
        return ["--recipe", "quickstart", *data, "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=1"]

    @property
    def one_device(self) -> list[str]:
        return [f"--trainer.accelerator={'gpu' if self.on_gpu else 'cpu'}", "--trainer.devices=1"]

    def start(self, name: str, options: Sequence[str], more: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "fusion", "fit", *self.short, *options, f"--runs={self.folder / name}"]
        log = open(self.log(name), "w")  # noqa: SIM115 (belongs to the process, and is closed when it ends)
        environment = self.environment | dict(more or {})
        return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def all_of(self, options_by_name: Mapping[str, Sequence[str]]) -> dict[str, int]:
        """Run them, concurrently on a GPU, one after the other on a CPU; returns their exit statuses."""
        statuses: dict[str, int] = {}
        started: dict[str, subprocess.Popen[str]] = {}
        for name, options in options_by_name.items():
            started[name] = self.start(name, options)
            if not self.on_gpu:
                statuses[name] = wait_for(started.pop(name))
        return statuses | {name: wait_for(process) for name, process in started.items()}

    def column(self, name: str, column: str) -> list[float]:
        files = sorted((self.folder / name).glob(f"*/*/{METRICS}"))
        return [float(record[column]) for file in files for record in read_metrics(file) if column in record]

    def last_line(self, name: str) -> str:
        """The error that a run printed, else the last line of its output."""
        lines = self.log(name).read_text(errors="replace").strip().splitlines() or ["nothing was printed"]
        return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1])[:140]


def wait_for(process: subprocess.Popen[str], timeout_s: float = TIMEOUT_S) -> int:
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


@dataclass(frozen=True)
class Bounds:
    """The largest relative error, against the reference run, of the first loss and of the mean of the last ten."""

    first: float
    last: float


def loss_finding(runs: Runs, name: str, status: int, bounds: Bounds, reference: str) -> Finding:
    """Whether a run succeeded, with losses within bounds of those of the reference run."""
    what, loss, expected = f"loss of {name}", runs.column(name, "train/loss_step"), runs.column(reference, "train/loss_step")
    if status or not loss or not expected:
        return Finding(False, what, f"ended with status {status}: {runs.last_line(name)}")
    tails = [sum(losses[-10:]) / len(losses[-10:]) for losses in (loss, expected)]
    first, last = abs(loss[0] / expected[0] - 1), abs(tails[0] / tails[1] - 1)
    good = first <= bounds.first and last <= bounds.last and math.isfinite(tails[0])
    detail = f"relative error of the first {first:.1e} (at most {bounds.first}), of the last ten {last:.1%} (at most {bounds.last:.0%})"
    skipped = runs.column(name, "train/skipped_updates")
    return Finding(good, what, detail + (f"; {skipped[-1]:.0f} updates skipped" if skipped else ""))


OVERFLOW = "fp16 with an overflowing initial scale"
PRECISIONS: dict[str, tuple[list[str], Bounds]] = {
    "float32": ([], Bounds(2e-3, 0.05)),
    "bf16": (BF16, Bounds(2e-2, 0.15)),
    "bf16 with AdamW": ([*BF16, *ADAMW], Bounds(2e-2, 3)),
    "fp16": (FP16, Bounds(5e-3, 0.15)),
    OVERFLOW: ([*FP16, f"--trainer.plugins.init_args.init_scale={2**32}"], Bounds(1, 0.5)),
    "bf16, compiled": ([*BF16, "--model.compile=true"], Bounds(2e-2, 0.15)),
}
ON_A_CPU = ("fp16", OVERFLOW, "bf16")


def precisions(runs: Runs) -> Iterator[Finding]:
    """The same data, weights and order in every precision, compared with float32 on the CPU."""
    reference = "float32 on the CPU"
    statuses = runs.all_of({reference: ["--recipe", "engine/cpu"]})
    if statuses[reference]:
        yield Finding(False, reference, runs.last_line(reference))
        return
    chosen = {name: settings for name, settings in PRECISIONS.items() if runs.on_gpu or name in ON_A_CPU}
    compiled = {name: settings for name, settings in chosen.items() if "compiled" in name}  # last and alone, since compiling uses all cores
    for part in ({name: settings for name, settings in chosen.items() if name not in compiled}, compiled):
        statuses = runs.all_of({name: [*options, *runs.one_device] for name, (options, _) in part.items()})
        for name, (_, bounds) in part.items():
            yield loss_finding(runs, name, statuses[name], bounds, reference)
    skipped = runs.column(OVERFLOW, "train/skipped_updates")
    detail = f"{skipped[-1] if skipped else 0:.0f} updates skipped until the scale no longer overflows"
    yield Finding(bool(skipped) and 0 < skipped[-1] < 40, "overflow", detail)


def killed(runs: Runs) -> Iterator[Finding]:
    """A killed and resumed run ends as an undisturbed one. With `deterministic`: otherwise CUDA may sum gradients in any order."""
    for name, optimizer in (("Muon", []), ("AdamW", ADAMW)) if runs.on_gpu else (("Muon", []),):
        kills = 2 if runs.on_gpu else 1
        options = [*runs.short, *runs.one_device, *optimizer, "--trainer.max_epochs=4", "--trainer.deterministic=true"]
        words = [sys.executable, "-m", "fusion", "benchmark", "kills", "--kills", str(kills), *options, "--checkpoint.every_updates=10"]
        done = subprocess.run(words, capture_output=True, text=True, env=runs.environment, timeout=TIMEOUT_S, check=False)
        last = (done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["nothing was printed"])[-1]
        yield Finding(done.returncode == 0, f"{name} killed and resumed", last[:140])


# Several ranks: GPUs, or two processes on a CPU.


def two_ranks(runs: Runs, compress: str = "none", timeout_s: float = 60) -> list[str]:
    strategy = [f"--trainer.strategy.init_args.compress={compress}", f"--trainer.strategy.init_args.timeout_s={timeout_s}"]
    return ["--recipe", "engine/ddp", f"--trainer.accelerator={'gpu' if runs.on_gpu else 'cpu'}", "--trainer.devices=2", *strategy]


# The first loss differs, since batch normalisation sees each rank's half of the batch.
COMPRESSIONS = {"none": Bounds(2e-2, 0.1), "fp16": Bounds(2e-2, 0.2), "bf16": Bounds(2e-2, 0.2), "sign": Bounds(2e-2, 0.5)}


def compressed(runs: Runs) -> Iterator[Finding]:
    """The loss of two ranks under each compression of the gradients."""
    for compress, bounds in COMPRESSIONS.items():
        if compress == "bf16" and not runs.on_gpu:  # gloo doesn't sum bf16
            continue
        name = f"two ranks, compress={compress}"
        yield loss_finding(runs, name, runs.all_of({name: two_ranks(runs, compress)})[name], bounds, "float32 on the CPU")


def lost_rank(runs: Runs) -> Iterator[Finding]:
    """When one of two ranks is killed, the other ends with a message and its own exit status, not by NCCL's watchdog."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    address |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "lost"}
    names = ["rank 0 of two", "rank 1 of two"]
    ranks = [
        runs.start(name, [*two_ranks(runs), "--trainer.max_epochs=5000"], {**address, "RANK": str(i), "LOCAL_RANK": str(i)})
        for i, name in enumerate(names)
    ]
    deadline = time.monotonic() + TIMEOUT_S / 2
    while time.monotonic() < deadline and not any((runs.folder / names[0]).glob("*/*/checkpoints/*.ckpt")):  # after an epoch
        time.sleep(0.5)
    os.killpg(ranks[1].pid, signal.SIGKILL)
    began = time.monotonic()
    status = wait_for(ranks[0], 120)
    detail = f"status {status} after {time.monotonic() - began:.0f} s (expected {LOST_RANK}): {runs.last_line(names[0])}"
    yield Finding(status == LOST_RANK, "a rank that lost another", detail)
