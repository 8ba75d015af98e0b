"""How a process ends, alone or with the other ranks."""

import os
import signal
import sys

from fusion.errors import INTERRUPTED, REQUEUE

SIGNALS = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: REQUEUE, signal.SIGUSR1: REQUEUE}  # that ask a run to end, and its status then


def leave(status: int, *, together: bool) -> None:
    """End the process; one that was in a gloo group without its destructors, which abort every third time.

    together: all ranks have agreed on this end, so that each waits for the others; one that ends alone would wait for ever.
    """
    if "torch" in sys.modules:
        distributed = sys.modules["torch"].distributed
        if distributed.is_available() and distributed.is_initialized():
            if together and status in (0, INTERRUPTED, REQUEUE):
                for number in SIGNALS:  # one that reaches this rank later than the others
                    signal.signal(number, signal.SIG_IGN)
                distributed.barrier()
                distributed.destroy_process_group()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    raise SystemExit(status)
