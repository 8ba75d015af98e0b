"""fusion benchmark kills: a run killed at random moments and resumed each time ends where the run that nobody disturbed does."""

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
BEGUN = "environment.json"  # which a run writes as its training begins


def benchmark_kills(arguments: Sequence[str], kills: int, seed: int) -> int:
    """Run the command `fit` with these arguments whole, then with kills; print what happened. 0 if both ends are the same to the bit."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Run(arguments, Path(folder) / "whole")
        whole_s, began_s = whole.to_its_end()
        disturbed = Run(arguments, Path(folder) / "killed")
        chance = random.Random(seed)
        rows = [["kill", "seconds into training", "its last checkpoint"]]
        resumed_s: list[float] = []
        for number in range(1, kills + 1):
            # Every fifth at any moment, the start of Python included; the others while it trains, validates or saves.
            span = whole_s - began_s
            anywhere = number % 5 == 0
            # Short enough that all the kills find it at work.
            seconds = chance.uniform(0, began_s + 2 * span / kills if anywhere else 2 * span / kills)
            began, ended = disturbed.killed_after(seconds, from_start=anywhere)
            if began is not None:
                resumed_s.append(began)
            rows.append([str(number), "before it" if ended is None else f"{ended:.1f}", disturbed.position()])
        disturbed.to_its_end()
        found = difference(disturbed.checkpoint(), whole.checkpoint()) or difference_of_logs(disturbed.log(), whole.log())
        print(aligned(rows))
        print(
            f"\nwhole run: {whole_s:.1f} s, of them {began_s:.1f} until training begins; resumed, until it goes on: "
            f"{statistics.median(resumed_s):.1f} s"
            f"\nafter {kills} kills: " + ("the same to the bit" if found is None else f"DIFFERENT: {found}")
        )
    return 0 if found is None else 1


class Run:
    """One run folder, and the processes that work on it one after the other."""

    def __init__(self, arguments: Sequence[str], runs: Path) -> None:
        self.arguments, self.runs = list(arguments), runs

    @property
    def folder(self) -> Path | None:
        """The run's folder, once there is a checkpoint in it to go on from; one that was killed before is done away with."""
        for found in sorted(self.runs.glob("*/*")):
            if any((found / "checkpoints").glob("*.ckpt")):
                return found
            shutil.rmtree(found)
        return None

    @property
    def output(self) -> Path:
        """What the last of its processes printed."""
        return self.runs.with_suffix(".log")

    def start(self) -> subprocess.Popen[bytes]:
        folder = self.folder
        words = ["--resume", str(folder)] if folder else [*self.arguments, f"--runs={self.runs}"]
        # Which the other ranks can be started by too.
        words = [sys.executable, "-m", "fusion", "fit", *words]
        with open(self.output, "wb") as output:
            return subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)

    def training_begun(self, process: subprocess.Popen[bytes], since_s: float) -> bool:
        """Waits until training begins, in a process that was started then (in seconds since 1970); whether it did."""
        while process.poll() is None:
            if any(file.stat().st_mtime >= since_s for file in self.runs.glob(f"*/*/{BEGUN}")):
                return True
            time.sleep(0.02)
        return False

    def to_its_end(self) -> tuple[float, float]:
        """Seconds in all, and until training began. Raises UserError where the run fails."""
        began, since = time.monotonic(), time.time()
        process = self.start()
        training_s = time.monotonic() - began if self.training_begun(process, since) else 0.0
        if process.wait():
            last = self.output.read_text(errors="replace").strip().splitlines()[-1]
            raise UserError(f"the run ended with status {process.returncode}: {last}")
        return time.monotonic() - began, training_s

    def killed_after(self, seconds: float, *, from_start: bool) -> tuple[float | None, float | None]:
        """Kill the run and all its ranks so long after its start, or after its training began; seconds until that, and since."""
        began, since = time.monotonic(), time.time()
        process = self.start()
        training_s = None
        if not from_start and self.training_begun(process, since):
            training_s = time.monotonic() - began
        time.sleep(seconds)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return training_s, None if training_s is None else seconds

    def position(self) -> str:
        folder = self.folder
        if folder is None:
            return "none yet: begins anew"
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
    """The first difference of two checkpoints, None if there is none."""
    return next((f"{part}: {found}" for part in PARTS if (found := unlike(a.get(part), b.get(part))) is not None), None)


def difference_of_logs(a: list[dict[str, str]], b: list[dict[str, str]]) -> str | None:
    """The same of two logs, whatever the order of their columns."""
    rows = [[dict(sorted(row.items())) for row in log] for log in (a, b)]
    return None if (found := unlike(*rows)) is None else f"metrics.csv, row {found}"


def unlike(a: Any, b: Any) -> str | None:
    """The first difference of two nested states of tensors and plain data; None if there is none."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return None if torch.equal(a, b) else f"tensors differ by up to {float((a - b).abs().max()):.1e}"
    if isinstance(a, dict) and isinstance(b, dict):
        if list(a) != list(b):
            return f"keys {list(a)} and {list(b)}"
        return next((f"{key}: {found}" for key in a if (found := unlike(a[key], b[key])) is not None), None)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return f"{len(a)} and {len(b)} long"
        return next((f"{i}: {found}" for i, (x, y) in enumerate(zip(a, b, strict=True)) if (found := unlike(x, y)) is not None), None)
    return None if a == b or (a != a and b != b) else f"{a!r} and {b!r}"
