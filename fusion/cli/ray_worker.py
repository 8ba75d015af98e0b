"""What each worker of a Ray cluster runs: fit, in a process of its own. Imports little, since all of Ray's processes import it."""

import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusion.benchmarks.processes import free_port
from fusion.errors import INTERRUPTED, REQUEUE, USER_MISTAKE


@dataclass
class Job:
    """The settings of a launch, passed to every worker."""

    new: list[str]  # options of fit that start the run
    more: list[str]  # options given with --resume, if the launch resumes a run
    accelerator: str
    runs: str  # the folder of the run folder
    resume: str | None  # the run folder to resume
    folder: str  # the working folder, to which relative paths refer
    channel: Any = None  # the Ray actor of a Channel
    environment: dict[str, str] = field(default_factory=dict)


class Channel:
    """Connects the command and the workers: carries the workers' output to the command, signals to the workers, and a worker's failure to
    the other workers.
    """

    def __init__(self) -> None:
        self.lines: list[tuple[int, str]] = []
        self.signal = self.mistake = 0

    def send(self, rank: int, text: str) -> None:
        self.lines.append((rank, text))

    def receive(self, number: int) -> list[tuple[int, str]]:
        """The lines printed since the last call, each with its rank. number: the signal to pass on to the workers, 0 if none."""
        lines, self.lines, self.signal = self.lines, [], number
        return lines

    def give_up(self, status: int) -> None:
        """Report that a worker ended with a user's mistake, which may concern one machine alone."""
        self.mistake = status

    def state(self) -> tuple[int, int]:
        """The signal that the command received, and the exit status of a worker that gave up; 0 if none."""
        return self.signal, self.mistake


def work(config: dict[str, Job]) -> int:
    """Run fit with one device, in a process group with the other workers. Returns its exit status; raises if Ray should restart them."""
    import ray
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    job, context = config["job"], get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    chosen = None
    if rank == 0:
        signal_number, _ = ray.get(job.channel.state.remote())
        chosen = (signal_number, ray.util.get_node_ip_address(), free_port(), job.resume or last_run(job.runs))
    signal_number, address, port, run = broadcast_from_rank_zero(chosen)
    if signal_number:  # received while the workers were starting
        return status_of(signal_number)
    words = ["--resume", run, *job.more] if run else [*job.new, f"--runs={job.runs}"]
    words += ["--trainer.devices=1", f"--trainer.num_nodes={world}", f"--trainer.accelerator={job.accelerator}"]
    # The variables that torchrun would set, with each worker as a node.
    group = {"MASTER_ADDR": address, "MASTER_PORT": port, "RANK": rank, "GROUP_RANK": rank, "WORLD_SIZE": world}
    group |= {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "TORCHELASTIC_RUN_ID": Path(job.runs).name}
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, *words],
        env=os.environ | {name: str(value) for name, value in group.items()} | job.environment,
        cwd=job.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    reader = threading.Thread(target=lambda: [job.channel.send.remote(rank, text.rstrip("\n")) for text in process.stdout or ()])
    reader.start()
    passed_on = 0
    while reader.is_alive():
        reader.join(1)
        signal_number, mistake = ray.get(job.channel.state.remote())
        if mistake:
            process.kill()
            return mistake
        if signal_number and not passed_on:
            process.send_signal(signal_number)
            passed_on = signal_number
    status = process.wait()
    if status == USER_MISTAKE:
        ray.get(job.channel.give_up.remote(status))
    if status in (0, USER_MISTAKE):
        return status
    if passed_on:
        return status_of(passed_on)
    raise RuntimeError(f"rank {rank} ended with status {status}")


def status_of(number: int) -> int:
    return INTERRUPTED if number == signal.SIGINT else REQUEUE


# `fusion fit`, killed when its worker dies (prctl, on Linux). Unblocks SIGINT, which Ray blocks in the processes that it starts.
CHILD = """
import ctypes, os, signal, sys
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
os.execv(sys.executable, [sys.executable, "-m", "fusion", "fit", *sys.argv[1:]])
"""


def last_run(runs: str) -> str | None:
    """The latest run under this folder that has a checkpoint to resume from, or None."""
    return max((str(checkpoint.parent.parent) for checkpoint in Path(runs).glob("*/*/checkpoints/*.ckpt")), default=None)
