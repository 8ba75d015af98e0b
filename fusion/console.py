"""Console output: printed once however many ranks there are, a sign of life from what takes long, and small tables."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_only

EVERY_S = 30.0
printed_at = 0.0


def is_rank_zero() -> bool:
    """Whether this process is the first of its group; known from the environment, before there is a group."""
    return getattr(rank_zero_only, "rank", None) in (None, 0)


def print_rank_zero(text: str) -> None:
    global printed_at
    printed_at = time.monotonic()
    if is_rank_zero():
        print(text, flush=True)


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
