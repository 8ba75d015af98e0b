"""What is known of a rank that is gone or silent, and how to end without waiting for it."""

from typing import Any

import torch.distributed as dist


def lost_a_rank(error: BaseException) -> bool:
    """Whether it is what gloo or NCCL say when a peer is gone or silent."""
    if not (dist.is_available() and isinstance(error, RuntimeError)):
        return False
    words = ("gloo", "caused pair closure", "NCCL")  # the second is gloo's too, of what waited behind that which timed out
    return isinstance(error, dist.DistError) or (dist.is_initialized() and any(word in str(error) for word in words))


class LeavesLostRanks:
    """A strategy that, once a rank is lost, moves nothing off the device when it ends: copies would wait there for the sum of gradients
    that is never done, until NCCL's watchdog ended the process without a word. The command ends it at once instead.
    """

    lost = False

    def on_exception(self, exception: BaseException) -> None:
        self.lost = lost_a_rank(exception)
        super().on_exception(exception)  # type: ignore[misc]

    def teardown(self) -> Any:
        return None if self.lost else super().teardown()  # type: ignore[misc]
