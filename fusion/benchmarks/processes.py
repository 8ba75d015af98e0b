"""Measurements in new processes, which share no memory with each other."""

import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any


def in_new_process(function: Callable[..., tuple[float, float]], *arguments: Any) -> tuple[float, float]:
    """What the function returns, called in a new process."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def memory_mib(what: str) -> float:
    """Memory of this process from /proc (Linux): VmRSS is the current value, VmHWM the peak."""
    match = re.search(rf"^{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) / 1024
