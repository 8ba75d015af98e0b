"""Ends a process, alone or together with the other ranks."""

import os
import signal
import sys

from fusion.errors import INTERRUPTED, REQUEUE

SIGNALS = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: REQUEUE, signal.SIGUSR1: REQUEUE}  # signals that stop a run, with its exit status


def leave(status: int, *, together: bool) -> None:
    """End the process; one in a gloo group ends without running destructors, which abort in about one of three cases.

    together: all ranks have agreed to end, so that each waits for the others; a rank that ends alone would wait forever.
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
