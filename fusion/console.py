"""Console output: printed once however many ranks there are, a sign of life from what takes long, and small tables."""

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

LOG = logging.getLogger("fusion")
EVERY_S = 30.0
printed_at = 0.0


def is_rank_zero() -> bool:
    """Whether this process is the first of its group; known from the environment, before there is a group."""
    known = sys.modules.get("lightning.fabric.utilities.rank_zero")  # a predictor needs no Lightning
    if known is not None:
        return getattr(known.rank_zero_only, "rank", None) in (None, 0)
    return next((os.environ[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ), "0") == "0"


def print_rank_zero(text: str) -> None:
    """Through the logger "fusion", which the commands print (see `printing`); by the first process of a group alone."""
    global printed_at
    printed_at = time.monotonic()
    if is_rank_zero():
        LOG.info(text)


class Printed(logging.Handler):
    """Log records as plain lines of the standard output."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), flush=True)


@contextmanager
def printing() -> Iterator[None]:
    """Around a command: what is logged is printed. A program that calls us listens to the logger "fusion" instead."""
    if any(isinstance(handler, Printed) for handler in LOG.handlers):
        yield
        return
    handler, level, propagate = Printed(), LOG.level, LOG.propagate
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        LOG.setLevel(level)
        LOG.propagate = propagate


@contextmanager
def silent() -> Iterator[None]:
    """Around a training whose lines nobody asked for."""
    level = LOG.level
    LOG.setLevel(logging.WARNING)
    try:
        yield
    finally:
        LOG.setLevel(level)


@contextmanager
def signs_of_life(doing: str, every_s: float = EVERY_S) -> Iterator[None]:
    """Around what takes long and can't say how far it is: a line whenever nothing has been printed for `every_s` seconds.

    Args:
        doing: what is being done, for that line.
        every_s: seconds between two lines.
    """
    began, done = time.monotonic(), threading.Event()

    def watch() -> None:
        while not done.wait(max(0.0, max(printed_at, began) + every_s - time.monotonic())):
            if time.monotonic() >= max(printed_at, began) + every_s:
                print_rank_zero(f"{doing}, for {time.monotonic() - began:,.0f} s so far")

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


class SignOfLife:
    """Whether it is time to print again: `every_s` seconds after the last time, or after it was made or reset.

    Args:
        every_s: seconds between two signs.
    """

    def __init__(self, every_s: float = EVERY_S) -> None:
        self.every_s = every_s
        self.reset()

    def reset(self) -> None:
        self.last = time.monotonic()

    def due(self) -> bool:
        now = time.monotonic()
        if now - self.last < self.every_s:
            return False
        self.last = now
        return True


def figure(value: float) -> str:
    """
    >>> figure(0.99583), figure(3.2e-20), figure(0.0)
    ('0.9958', '3.2e-20', '0.0000')
    """
    return f"{value:.4f}" if abs(value) >= 1e-3 or value == 0 else f"{value:.4g}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns, the first to the left, the others to the right.

    >>> print(aligned([["head", "accuracy"], ["Gated", "0.98"]]))
    head   accuracy
    Gated      0.98
    """
    columns = max(len(row) for row in rows)
    filled = [[*row, *[""] * (columns - len(row))] for row in rows]
    widths = [max(len(row[i]) for row in filled) for i in range(columns)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in filled
    )
