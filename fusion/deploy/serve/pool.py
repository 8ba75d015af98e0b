"""The threads that do all work but HTTP: they decode and preprocess requests, and run batches."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from fusion.deploy.serve.batcher import Batcher, Waiting

CHUNK = 8  # jobs that a thread takes at once


class Pool:
    """Each thread takes what is most urgent: a batch that is due, then jobs to preprocess; of copies, only if there is nothing else.

    As many threads as cores, each of which does both, contend less for Python's lock than separate threads for decoding and for models.

    Args:
        preprocess: turns a job into a sample that waits for a model; None where there is none to wait. Must not raise.
        run: runs a batch. Must not raise.
        batcher: holds the samples that wait.
        threads: number of threads.
        runs: number of batches that may run at once.
    """

    def __init__(
        self,
        preprocess: Callable[[Any], Waiting | None],
        run: Callable[[list[Waiting]], None],
        batcher: Batcher,
        *,
        threads: int,
        runs: int,
    ) -> None:
        self.preprocess, self.run, self.batcher, self.runs = preprocess, run, batcher, runs
        self.jobs: dict[bool, deque[Any]] = {False: deque(), True: deque()}  # second ones apart
        self.changed = threading.Condition(threading.Lock())
        self.idle = self.running = 0
        self.closed = False
        self.threads = [threading.Thread(target=self.work, name=f"pool-{i}", daemon=True) for i in range(threads)]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    @property
    def alive(self) -> bool:
        return all(thread.is_alive() for thread in self.threads)

    def put(self, job: Any, *, second: bool = False) -> None:
        """A job to preprocess. second: only when there is nothing else to do."""
        with self.changed:
            self.jobs[second].append(job)
            if self.idle:
                self.changed.notify()

    def add(self, waiting: Sequence[Waiting]) -> None:
        """Samples that wait for a model."""
        with self.changed:
            now = time.monotonic()
            urgent = 0
            for one in waiting:
                urgent += self.batcher.add(one, now)
            if urgent and self.idle:
                self.changed.notify()

    def close(self, wait_s: float | None = None) -> None:
        """Do what is left to do, and end the threads. wait_s: for no longer than this; a model may hang."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        end = None if wait_s is None else time.monotonic() + wait_s
        for thread in self.threads:
            thread.join(None if end is None else max(end - time.monotonic(), 0))

    def work(self) -> None:
        while (taken := self.take()) is not None:
            batch, jobs = taken
            if batch:
                self.run(batch)
                with self.changed:
                    self.running -= 1
                    if self.idle and len(self.batcher):
                        self.changed.notify()
            else:
                waiting = [one for one in map(self.preprocess, jobs) if one is not None]
                if waiting:
                    self.add(waiting)

    def take(self) -> tuple[list[Waiting], list[Any]] | None:
        """A batch, or jobs to preprocess; None when closed and nothing is left."""
        with self.changed:
            while True:
                now = time.monotonic()
                for second in (False, True):
                    if self.running < self.runs and (batch := self.batcher.take(now, second=second)):
                        self.running += 1
                        return batch, []
                    if jobs := self.jobs[second]:
                        share = -(-len(jobs) // len(self.threads))  # rounded up
                        return [], [jobs.popleft() for _ in range(min(share, CHUNK))]
                if self.closed and not len(self.batcher):
                    return None
                self.idle += 1
                self.changed.wait(self.batcher.pause(now) if self.running < self.runs else None)
                self.idle -= 1
