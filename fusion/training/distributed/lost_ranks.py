"""Detection of lost ranks (gone or not responding), and ending a run without waiting for them."""

from typing import Any

import torch.distributed as dist


def lost_a_rank(error: BaseException) -> bool:
    """Whether an error is one that gloo or NCCL raise when a peer is gone or not responding."""
    if not (dist.is_available() and isinstance(error, RuntimeError)):
        return False
    phrases = ("gloo", "caused pair closure", "NCCL")  # the second is also gloo's, for operations queued behind the one that timed out
    return isinstance(error, dist.DistError) or (dist.is_initialized() and any(phrase in str(error) for phrase in phrases))


class LeavesLostRanks:
    """Mixin of strategies that skips teardown once a rank is lost: moving tensors off the device would wait for a reduction that never
    completes, until NCCL's watchdog ends the process without a message. The command ends the process immediately instead.
    """

    lost = False

    def on_exception(self, exception: BaseException) -> None:
        self.lost = lost_a_rank(exception)
        super().on_exception(exception)  # type: ignore[misc]

    def teardown(self) -> Any:
        return None if self.lost else super().teardown()  # type: ignore[misc]
