"""Threads that decode and preprocess requests off the event loop."""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any


class Pool:
    """Calls a function for each job in one of several threads, in the order in which they are put.

    A plain queue costs a fraction of an executor's futures, of which the event loop would be woken for each.

    Args:
        function: must not raise.
        threads: number of threads.
    """

    def __init__(self, function: Callable[[Any], None], threads: int) -> None:
        self.function = function
        self.queue: SimpleQueue[Any] = SimpleQueue()
        self.threads = [threading.Thread(target=self.work, name=f"decode-{i}", daemon=True) for i in range(threads)]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    @property
    def alive(self) -> bool:
        return all(thread.is_alive() for thread in self.threads)

    def put(self, job: Any) -> None:
        self.queue.put(job)

    def close(self) -> None:
        """Work off what was put, and end the threads."""
        for _ in self.threads:
            self.queue.put(None)
        for thread in self.threads:
            thread.join()

    def work(self) -> None:
        while (job := self.queue.get()) is not None:
            self.function(job)
