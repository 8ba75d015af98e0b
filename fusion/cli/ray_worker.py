"""What runs in each worker of a Ray cluster: fit, as a process of its own. Light, since all of Ray's processes import it."""

import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusion.errors import INTERRUPTED, REQUEUE, USER_MISTAKE


@dataclass
class Job:
    """What the workers are to do."""

    new: list[str]  # options of fit that begin the run
    more: list[str]  # options that go with --resume, where the run was there before
    accelerator: str
    runs: str  # where the run's folder is
    resume: str | None  # this run
    folder: str  # where relative paths are seen from
    line: Any = None  # a Line in the cluster
    environment: dict[str, str] = field(default_factory=dict)


class Line:
    """Between the command and the workers: what they print one way, signals the other. And between the workers: that one gave up."""

    def __init__(self) -> None:
        self.said: list[tuple[int, str]] = []
        self.asked = self.mistake = 0

    def say(self, rank: int, text: str) -> None:
        self.said.append((rank, text))

    def heard(self, asked: int) -> list[tuple[int, str]]:
        """What was said since last time. asked: the signal to pass on, 0 if none."""
        said, self.said, self.asked = self.said, [], asked
        return said

    def give_up(self, status: int) -> None:
        """Because of a mistake, which may be that of one machine alone."""
        self.mistake = status

    def wishes(self) -> tuple[int, int]:
        """The signal that was sent to the command, and the status of a worker that gave up; 0 if none."""
        return self.asked, self.mistake


def work(config: dict[str, Job]) -> int:
    """One worker: fit with one device, in a group with the others'. Gives its status; raises for those after which Ray should start all of
    the workers again.
    """
    import ray
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    job, context = config["job"], get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    mine = None
    if rank == 0:
        asked, _ = ray.get(job.line.wishes.remote())
        mine = (asked, ray.util.get_node_ip_address(), free_port(), job.resume or last_run(job.runs))
    asked, address, port, run = broadcast_from_rank_zero(mine)
    if asked:  # while the workers were being started
        return status_of(asked)
    words = ["--resume", run, *job.more] if run else [*job.new, f"--runs={job.runs}"]
    words += ["--trainer.devices=1", f"--trainer.num_nodes={world}", f"--trainer.accelerator={job.accelerator}"]
    # As torchrun would tell it, each worker a node.
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
    reader = threading.Thread(target=lambda: [job.line.say.remote(rank, text.rstrip("\n")) for text in process.stdout or ()])
    reader.start()
    passed_on = 0
    while reader.is_alive():
        reader.join(1)
        asked, mistake = ray.get(job.line.wishes.remote())
        if mistake:
            process.kill()
            return mistake
        if asked and not passed_on:
            process.send_signal(asked)
            passed_on = asked
    status = process.wait()
    if status == USER_MISTAKE:
        ray.get(job.line.give_up.remote(status))
    if status in (0, USER_MISTAKE):
        return status
    if passed_on:
        return status_of(passed_on)
    raise RuntimeError(f"rank {rank} ended with status {status}")


def status_of(number: int) -> int:
    return INTERRUPTED if number == signal.SIGINT else REQUEUE


# `fusion fit`, which the death of its worker ends as well (on Linux, where a process can ask for that). Ray blocks Ctrl-C in all it starts.
CHILD = """
import ctypes, os, signal, sys
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
os.execv(sys.executable, [sys.executable, "-m", "fusion", "fit", *sys.argv[1:]])
"""


def last_run(runs: str) -> str | None:
    """The run under this folder that has a checkpoint to go on from."""
    return max((str(found.parent.parent) for found in Path(runs).glob("*/*/checkpoints/*.ckpt")), default=None)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("", 0))
        return int(taken.getsockname()[1])
