"""Console output: lines printed by rank zero only, progress messages of long operations, and small tables."""

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

LOG = logging.getLogger("fusion")
EVERY_S = 30.0
printed_at = 0.0


def is_rank_zero() -> bool:
    """Whether this process is the first of its group; read from the environment before the group exists."""
    rank_zero = sys.modules.get("lightning.fabric.utilities.rank_zero")  # a predictor needs no Lightning
    if rank_zero is not None:
        return getattr(rank_zero.rank_zero_only, "rank", None) in (None, 0)
    return next((os.environ[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ), "0") == "0"


def print_rank_zero(text: str) -> None:
    """Logs to the logger "fusion", which the commands print (see `printing`); only in the first process of a group."""
    global printed_at
    printed_at = time.monotonic()
    if is_rank_zero():
        LOG.info(text)


class Printed(logging.Handler):
    """Writes log records as plain lines to the standard output."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), flush=True)


@contextmanager
def printing() -> Iterator[None]:
    """Prints the records of the logger "fusion" during a command. A program that uses this library handles that logger itself."""
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
def log_level(level: int, *names: str) -> Iterator[None]:
    """Sets the level of these loggers inside the block; "" is the root."""
    loggers = [logging.getLogger(name) for name in names]
    earlier = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, own in zip(loggers, earlier, strict=True):
            logger.setLevel(own)


def silent() -> AbstractContextManager[None]:
    """Context without the output of training runs."""
    return log_level(logging.WARNING, LOG.name)


@contextmanager
def heartbeat(doing: str, every_s: float = EVERY_S) -> Iterator[None]:
    """During a long operation without progress information, prints a line whenever nothing has been printed for `every_s` seconds.

    Args:
        doing: description of the operation, for that line.
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


class Heartbeat:
    """Whether it is time to print again: `every_s` seconds after the last time, or after it was made or reset.

    Args:
        every_s: seconds between two messages.
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


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """The lines of a table with aligned columns, the first to the left, the others to the right.

    >>> print(aligned([["head", "accuracy"], ["Gated", "0.98"]]))
    head   accuracy
    Gated      0.98
    """
    columns = max(len(line) for line in lines)
    filled = [[*line, *[""] * (columns - len(line))] for line in lines]
    widths = [max(len(line[i]) for line in filled) for i in range(columns)]
    return "\n".join(
        "  ".join(
            entry.ljust(width) if i == 0 else entry.rjust(width) for i, (entry, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in filled
    )
