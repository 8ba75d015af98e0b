"""What runs in each worker of a Ray cluster: fit, as a process of its own. Light, since all of Ray's processes import it."""

import os
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
    """Between the command and the workers: what they print one way, signals the other."""

    def __init__(self) -> None:
        self.said: list[tuple[int, str]] = []
        self.asked = 0

    def say(self, rank: int, text: str) -> None:
        self.said.append((rank, text))

    def heard(self, asked: int) -> list[tuple[int, str]]:
        """What was said since last time. asked: the signal to pass on, 0 if none."""
        said, self.said, self.asked = self.said, [], asked
        return said

    def signal(self) -> int:
        return self.asked


def work(config: dict[str, Job]) -> int:
    """One worker: fit with one device, in a group with the others'. Gives its status; raises for those after which Ray should start all of
    the workers again.
    """
    import ray
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    job, context = config["job"], get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    mine = (ray.util.get_node_ip_address(), free_port(), job.resume or last_run(job.runs)) if rank == 0 else None
    address, port, run = broadcast_from_rank_zero(mine)
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
    stopping = 0
    while reader.is_alive():
        reader.join(1)
        if not stopping and (stopping := ray.get(job.line.signal.remote())):
            process.send_signal(stopping)
    status = process.wait()
    if status in (0, USER_MISTAKE) or (stopping and status in (REQUEUE, INTERRUPTED)):
        return status
    raise RuntimeError(f"rank {rank} ended with status {status}")


# `fusion fit`, which the death of its worker ends as well (on Linux, where a process can ask for that).
CHILD = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
os.execv(sys.executable, [sys.executable, "-m", "fusion", "fit", *sys.argv[1:]])
"""


def last_run(runs: str) -> str | None:
    """The run under this folder that has a checkpoint to go on from."""
    return max((str(found.parent.parent) for found in Path(runs).glob("*/*/checkpoints/last.ckpt")), default=None)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("", 0))
        return int(taken.getsockname()[1])
