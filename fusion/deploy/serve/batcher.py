"""Dynamic batching: which of the samples that wait are run together, and when. Without threads, see pool.py."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One preprocessed sample. inputs: by name, each a batch of one. length: a batch is padded to that of its longest sample."""

    inputs: Mapping[str, Any]
    length: int


@dataclass(slots=True, eq=False)
class Waiting:
    """A preprocessed sample that waits for a model.

    lane: only samples of one lane share a batch. job: whose sample it is. second: whether everything else goes first. since: when it began
    to wait.
    """

    lane: Hashable
    row: Row
    job: Any
    second: bool = False
    since: float = 0.0


class Batcher:
    """The samples that wait, by lane. A batch is due as soon as one is full, or its oldest sample has waited for the longest time.

    Args:
        is_gone: whether nobody waits for a job any more; it is then dropped.
        batch_size: the largest batch.
        wait_s: the longest time for which a sample waits for others while a thread is idle.
    """

    def __init__(self, is_gone: Callable[[Any], bool], *, batch_size: int, wait_s: float) -> None:
        self.is_gone, self.batch_size, self.wait_s = is_gone, batch_size, wait_s
        self.lanes: dict[tuple[bool, Hashable], list[Waiting]] = {}

    def __len__(self) -> int:
        return sum(map(len, self.lanes.values()))

    def add(self, waiting: Waiting, now: float) -> bool:
        """Adds a sample; returns whether a thread that sleeps must learn of it: of a new lane's time, or of a full batch."""
        waiting.since = now
        lane = self.lanes.setdefault((waiting.second, waiting.lane), [])
        lane.append(waiting)
        return len(lane) == 1 or len(lane) >= self.batch_size

    def take(self, now: float, *, second: bool) -> list[Waiting]:
        """The batch that is due, of several the one that waits longest; empty if none is. second: whether of the second lanes."""
        while lane := min(
            (lane for (of_second, _), lane in self.lanes.items() if of_second == second and self.until(lane, now) <= 0),
            key=lambda lane: lane[0].since,
            default=None,
        ):
            key = (second, lane[0].lane)
            batch, rest = chosen([one for one in lane if not self.is_gone(one.job)], self.batch_size)
            if rest:
                self.lanes[key] = rest
            else:
                del self.lanes[key]
            if batch:
                return batch
        return []

    def until(self, lane: Sequence[Waiting], now: float) -> float:
        """Seconds until a lane's batch is due."""
        return 0.0 if len(lane) >= self.batch_size else lane[0].since + self.wait_s - now

    def pause(self, now: float) -> float | None:
        """Seconds until a batch is due; None while nothing waits."""
        return min((max(self.until(lane, now), 0.0) for lane in self.lanes.values()), default=None)


def chosen(lane: Sequence[Waiting], batch_size: int) -> tuple[list[Waiting], list[Waiting]]:
    """Splits a lane into a batch and the rest: the sample that waits longest, with those of the most similar lengths.

    No sample waits for ever: it becomes the one that waits longest itself.
    """
    if len(lane) <= batch_size:
        return list(lane), []
    length = lane[0].row.length
    nearest = sorted(range(len(lane)), key=lambda i: (abs(lane[i].row.length - length), i))[:batch_size]
    taken = set(nearest)
    return [lane[i] for i in sorted(taken)], [one for i, one in enumerate(lane) if i not in taken]
