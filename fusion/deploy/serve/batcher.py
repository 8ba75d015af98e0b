"""Dynamic batching: samples that arrive one by one are run together, grouped by their length."""

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from fusion.deploy.serve.stacking import Row


@dataclass(slots=True, eq=False)
class Waiting:
    """A sample that waits for a model.

    lane: only samples of one lane share a batch. job: whose sample it is. second: whether samples of other lanes go first. since: when it
    began to wait.
    """

    lane: Hashable
    row: Row
    job: Any
    second: bool = False
    since: float = 0.0


class Batcher:
    """Runs batches in threads: a batch as soon as one is full, or its oldest sample has waited for the longest time.

    Args:
        run: called in a thread with a lane and the jobs and rows of a batch.
        is_gone: whether nobody waits for a job any more; it is then dropped.
        batch_size: the largest batch.
        wait_s: the longest time for which a sample waits for others while a thread is idle.
        threads: number of batches that are run at once.
    """

    def __init__(
        self,
        run: Callable[[Any, list[Any], list[Row]], None],
        is_gone: Callable[[Any], bool],
        *,
        batch_size: int,
        wait_s: float,
        threads: int,
    ) -> None:
        self.run, self.is_gone, self.batch_size, self.wait_s = run, is_gone, batch_size, wait_s
        self.lanes: dict[Hashable, list[Waiting]] = {}
        self.condition = threading.Condition(threading.Lock())
        self.idle, self.closed = 0, False
        self.threads = [threading.Thread(target=self.work, name=f"model-{i}", daemon=True) for i in range(threads)]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    @property
    def alive(self) -> bool:
        return all(thread.is_alive() for thread in self.threads)

    def add(self, waiting: Waiting) -> None:
        waiting.since = time.monotonic()
        with self.condition:
            lane = self.lanes.setdefault(waiting.lane, [])
            lane.append(waiting)
            # A thread that sleeps must learn of a new lane's time, and of a full batch.
            if self.idle and (len(lane) == 1 or len(lane) >= self.batch_size):
                self.condition.notify()

    def close(self) -> None:
        """Run what waits, and end the threads."""
        with self.condition:
            self.closed = True
            self.condition.notify_all()
        for thread in self.threads:
            thread.join()

    def work(self) -> None:
        while batch := self.take():
            self.run(batch[0].lane, [one.job for one in batch], [one.row for one in batch])

    def take(self) -> list[Waiting]:
        """The next batch; empty when closed and nothing waits."""
        with self.condition:
            while True:
                lane, pause = self.due(time.monotonic())
                if lane is not None:
                    batch, rest = chosen([one for one in lane if not self.is_gone(one.job)], self.batch_size)
                    lane[:] = rest
                    if batch:
                        return batch
                    continue
                if self.closed:
                    return []
                self.idle += 1
                self.condition.wait(pause)
                self.idle -= 1

    def due(self, now: float) -> tuple[list[Waiting] | None, float | None]:
        """The lane whose batch is to be run now, of several the one that waits longest; or the time until one is, None for never."""
        for key in [key for key, lane in self.lanes.items() if not lane]:
            del self.lanes[key]
        by_age = sorted(self.lanes.values(), key=lambda lane: (lane[0].second, lane[0].since))
        until = [0.0 if self.closed or len(lane) >= self.batch_size else lane[0].since + self.wait_s - now for lane in by_age]
        for lane, seconds in zip(by_age, until, strict=True):
            if seconds <= 0:
                return lane, None
        return None, min(until, default=None)


def chosen(lane: Sequence[Waiting], batch_size: int) -> tuple[list[Waiting], list[Waiting]]:
    """Splits a lane into a batch and the rest: the sample that waits longest, with those of the most similar lengths.

    A sample waits for at most as many batches as there are older ones: it becomes the oldest itself.
    """
    if len(lane) <= batch_size:
        return list(lane), []
    length = lane[0].row.length
    nearest = sorted(range(len(lane)), key=lambda i: (abs(lane[i].row.length - length), i))[:batch_size]
    taken = set(nearest)
    return [lane[i] for i in sorted(taken)], [one for i, one in enumerate(lane) if i not in taken]
