"""Measurements in new processes, which share no memory with each other."""

import os
import re
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # of glibc: freed blocks of more bytes go back to the system, instead of being held


def in_new_process(function: Callable[..., T], *arguments: Any, environment: Mapping[str, str] | None = None) -> T:
    """What the function returns, called in a new process, in which these environment variables are set from its start."""
    before = {name: os.environ.get(name) for name in environment or {}}
    os.environ.update(environment or {})
    try:
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def memory_mib(what: str) -> float:
    """Memory of this process from /proc (Linux): VmRSS is the current value, VmHWM the peak."""
    match = re.search(rf"^{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) / 1024


def forget_peak_memory() -> None:
    """From now on VmHWM is the peak since this call (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        return int(taken.getsockname()[1])
