"""Console output: printed once however many ranks there are, and a sign of life from what takes long."""

import time

from lightning.pytorch.utilities import rank_zero_only

EVERY_S = 30.0


def is_rank_zero() -> bool:
    """Whether this process is the first of its group; known from the environment, before there is a group."""
    return getattr(rank_zero_only, "rank", None) in (None, 0)


def print_rank_zero(text: str) -> None:
    if is_rank_zero():
        print(text, flush=True)


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
