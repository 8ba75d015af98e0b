"""fusion benchmark kills: checks that a run killed at random moments and resumed each time ends exactly as an undisturbed run."""

import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fusion.console import aligned
from fusion.errors import UserError
from fusion.runs.checkpoint_files import read_checkpoint
from fusion.training.callbacks.run_folder import read_metrics

PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "Fp16", "current_model_state", "averaging_state", "fusion")
STARTED = "environment.json"  # written when training begins


def benchmark_kills(arguments: Sequence[str], kills: int, seed: int) -> int:
    """Run `fit` with these arguments undisturbed, then with kills, and print the comparison. Returns 0 if both ends are bitwise equal."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Run(arguments, Path(folder) / "whole")
        whole_s, startup_s = whole.to_its_end()
        disturbed = Run(arguments, Path(folder) / "killed")
        chance = random.Random(seed)
        lines = [["kill", "seconds into training", "last checkpoint"]]
        resumed_s: list[float] = []
        for number in range(1, kills + 1):
            # Every fifth kill at any moment, including startup; the others during training, validation or saving.
            span = whole_s - startup_s
            anywhere = number % 5 == 0
            # Short enough that every kill comes before the run ends.
            seconds = chance.uniform(0, startup_s + 2 * span / kills if anywhere else 2 * span / kills)
            began, trained = disturbed.kill_after(seconds, from_start=anywhere)
            if began is not None:
                resumed_s.append(began)
            lines.append([str(number), "before it" if trained is None else f"{trained:.1f}", disturbed.position()])
        disturbed.to_its_end()
        different = difference(disturbed.checkpoint(), whole.checkpoint()) or difference_of_logs(disturbed.log(), whole.log())
        print(aligned(lines))
        print(
            f"\nundisturbed run: {whole_s:.1f} s, {startup_s:.1f} s of it before training; startup of resumed runs: "
            f"{statistics.median(resumed_s):.1f} s"
            f"\nafter {kills} kills: " + ("bitwise equal" if different is None else f"DIFFERENT: {different}")
        )
    return 0 if different is None else 1


class Run:
    """A run folder, and the processes that train in it one after the other."""

    def __init__(self, arguments: Sequence[str], runs: Path) -> None:
        self.arguments, self.runs = list(arguments), runs

    @property
    def folder(self) -> Path | None:
        """The run folder, if it has a checkpoint to resume from; folders of runs killed before their first checkpoint are removed."""
        for folder in sorted(self.runs.glob("*/*")):
            if any((folder / "checkpoints").glob("*.ckpt")):
                return folder
            shutil.rmtree(folder)
        return None

    @property
    def output(self) -> Path:
        """The output of the latest process."""
        return self.runs.with_suffix(".log")

    def start(self) -> subprocess.Popen[bytes]:
        folder = self.folder
        words = ["--resume", str(folder)] if folder else [*self.arguments, f"--runs={self.runs}"]
        # As a module, by which Lightning can start the other ranks too.
        words = [sys.executable, "-m", "fusion", "fit", *words]
        with open(self.output, "wb") as output:
            return subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)

    def training_began(self, process: subprocess.Popen[bytes], since_s: float) -> bool:
        """Wait until the process begins training; False if it ends before. since_s: the time of its start, in seconds since 1970."""
        while process.poll() is None:
            if any(file.stat().st_mtime >= since_s for file in self.runs.glob(f"*/*/{STARTED}")):
                return True
            time.sleep(0.02)
        return False

    def to_its_end(self) -> tuple[float, float]:
        """Run to the end; returns the seconds in total and until training began. Raises UserError if the run fails."""
        began, since = time.monotonic(), time.time()
        process = self.start()
        training_s = time.monotonic() - began if self.training_began(process, since) else 0.0
        if process.wait():
            last = self.output.read_text(errors="replace").strip().splitlines()[-1]
            raise UserError(f"the run ended with status {process.returncode}: {last}")
        return time.monotonic() - began, training_s

    def kill_after(self, seconds: float, *, from_start: bool) -> tuple[float | None, float | None]:
        """Kill the run and all its ranks so many seconds after its start, or after training began. Returns the seconds until training
        began, and those trained.
        """
        began, since = time.monotonic(), time.time()
        process = self.start()
        training_s = None
        if not from_start and self.training_began(process, since):
            training_s = time.monotonic() - began
        time.sleep(seconds)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return training_s, None if training_s is None else seconds

    def position(self) -> str:
        folder = self.folder
        if folder is None:
            return "none yet: starts again"
        try:
            return f"{read_checkpoint(folder / 'checkpoints' / 'last.ckpt')['fusion']['updates']:,} updates"
        except UserError as error:
            return str(error)

    def checkpoint(self) -> dict[str, Any]:
        assert self.folder is not None
        return read_checkpoint(self.folder / "checkpoints" / "last.ckpt")

    def log(self) -> list[dict[str, str]]:
        assert self.folder is not None
        return read_metrics(self.folder / "metrics.csv")


def difference(a: dict[str, Any], b: dict[str, Any]) -> str | None:
    """The first difference between two checkpoints, or None."""
    return next((f"{part}: {what}" for part in PARTS if (what := difference_of(a.get(part), b.get(part))) is not None), None)


def difference_of_logs(a: list[dict[str, str]], b: list[dict[str, str]]) -> str | None:
    """The first difference between two logs, whatever the order of their columns, or None."""
    records = [[dict(sorted(record.items())) for record in log] for log in (a, b)]
    return None if (what := difference_of(*records)) is None else f"metrics.csv, record {what}"


def difference_of(a: Any, b: Any) -> str | None:
    """The first difference between two nested states of tensors and plain data, or None."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return None if torch.equal(a, b) else f"tensors differ by up to {float((a - b).abs().max()):.1e}"
    if isinstance(a, dict) and isinstance(b, dict):
        if list(a) != list(b):
            return f"keys {list(a)} and {list(b)}"
        return next((f"{key}: {what}" for key in a if (what := difference_of(a[key], b[key])) is not None), None)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return f"lengths {len(a)} and {len(b)}"
        return next((f"{i}: {what}" for i, (x, y) in enumerate(zip(a, b, strict=True)) if (what := difference_of(x, y)) is not None), None)
    return None if a == b or (a != a and b != b) else f"{a!r} and {b!r}"
