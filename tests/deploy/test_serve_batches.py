"""Which samples are run together, when, and by which thread."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import PATIENCE_S

from fusion.deploy.serve.batcher import Batcher, Row, Waiting, chosen
from fusion.deploy.serve.pool import Pool


def waiting(name, length=1, *, lane="main", second=False):
    return Waiting(lane, Row({}, length), name, second)


def batcher(size=3, gone=()):
    return Batcher(lambda job: job in gone, batch_size=size, wait_s=10.0)


def names(batch):
    return [one.job for one in batch]


def test_a_batch_is_due_when_full_or_when_its_oldest_sample_has_waited():
    lanes = batcher()
    assert lanes.pause(0.0) is None
    assert lanes.add(waiting("a"), 100.0)  # a thread must learn when it is due
    assert not lanes.add(waiting("b"), 104.0)
    assert (names(lanes.take(105.0, second=False)), lanes.pause(105.0)) == ([], 5.0)
    assert names(lanes.take(110.0, second=False)) == ["a", "b"]
    assert not len(lanes)
    for one in "abc":
        urgent = lanes.add(waiting(one), 200.0)
    assert urgent
    assert names(lanes.take(200.0, second=False)) == ["a", "b", "c"]


def test_samples_of_two_versions_never_share_a_batch():
    lanes = batcher()
    for i, lane in enumerate(["old", "new", "new", "old"]):
        lanes.add(waiting(i, lane=lane), float(i))
    assert [names(lanes.take(20.0, second=False)) for _ in range(3)] == [[0, 3], [1, 2], []]


def test_copies_are_taken_only_when_asked_for():
    lanes = batcher(size=1)
    lanes.add(waiting("copy", second=True), 0.0)
    lanes.add(waiting("request"), 1.0)
    assert names(lanes.take(2.0, second=False)) == ["request"]
    assert names(lanes.take(2.0, second=False)) == []
    assert names(lanes.take(2.0, second=True)) == ["copy"]


def test_a_sample_whose_client_has_left_is_dropped():
    lanes = batcher(gone={"b", "c"})
    for one in "bac":
        lanes.add(waiting(one), 0.0)
    lanes.add(waiting("c", lane="other"), 0.0)
    assert [names(lanes.take(20.0, second=False)) for _ in range(2)] == [["a"], []]
    assert not len(lanes)


def test_a_batch_holds_the_oldest_sample_and_those_of_similar_length():
    lane = [waiting(length, length) for length in (50, 3, 4, 60, 5, 49)]
    batch, rest = chosen(lane, 3)
    assert (names(batch), names(rest)) == ([50, 60, 49], [3, 4, 5])


@given(st.lists(st.integers(1, 64), min_size=1, max_size=60), st.integers(1, 8))
def test_every_sample_is_taken_once_the_oldest_first(lengths, size):
    lane, taken = [waiting(i, length) for i, length in enumerate(lengths)], []
    while lane:
        oldest = lane[0].job
        batch, lane = chosen(lane, size)
        assert oldest in names(batch)
        assert len(batch) <= size
        taken += names(batch)
    assert sorted(taken) == list(range(len(lengths)))


def test_grouping_by_length_saves_padding():
    rng = np.random.default_rng(0)
    lane = [waiting(i, int(length)) for i, length in enumerate(rng.integers(1, 65, 512))]
    in_order = sum(8 * max(one.row.length for one in lane[i : i + 8]) for i in range(0, 512, 8))
    grouped = 0
    while lane:
        batch, lane = chosen(lane, 8)
        grouped += 8 * max(one.row.length for one in batch)
    assert grouped < 0.75 * in_order  # 0.66 here; 0.56 would be no padding at all


class Held:
    """What a pool does, under a test's control."""

    def __init__(self, *, threads, runs, size=2):
        self.done, self.began, self.go = [], threading.Semaphore(0), threading.Semaphore(0)
        lanes = Batcher(lambda job: False, batch_size=size, wait_s=0.0)
        self.pool = Pool(self.preprocess, self.run, lanes, threads=threads, runs=runs)

    def preprocess(self, job):
        self.begin(("preprocess", job))
        return waiting(job, second=job.startswith("copy"))

    def run(self, batch):
        self.begin(("run", *names(batch)))

    def begin(self, what):
        self.done.append(what)
        self.began.release()
        assert self.go.acquire(timeout=PATIENCE_S)

    def step(self):
        """Lets one thread go on, and waits until the next thing has begun."""
        self.go.release()
        assert self.began.acquire(timeout=PATIENCE_S)


def test_a_thread_takes_the_most_urgent_work_and_copies_last():
    held = Held(threads=1, runs=1)
    for one in ("first", "copy 1", "second", "copy 2"):
        held.pool.put(one, second=one.startswith("copy"))
    held.pool.start()
    assert held.began.acquire(timeout=PATIENCE_S)
    held.pool.put("third")  # while the first is preprocessed
    for _ in range(6):
        held.step()
    held.go.release(100)
    held.pool.close()
    assert [what for what, *_ in held.done].count("run") == 3
    assert held.done[:4] == [("preprocess", "first"), ("preprocess", "second"), ("run", "first", "second"), ("preprocess", "third")]
    assert [one for one in held.done if "copy" in str(one)] == [
        ("preprocess", "copy 1"),
        ("preprocess", "copy 2"),
        ("run", "copy 1", "copy 2"),
    ]


def test_a_batch_is_run_on_time_though_another_thread_is_kept_by_a_job():
    release, held, ran, done = threading.Event(), threading.Semaphore(0), threading.Semaphore(0), []

    def preprocess(job):
        if job == "slow":
            held.release()
            assert release.wait(PATIENCE_S)
        return waiting(job)

    def run(batch):
        done.extend(names(batch))
        ran.release()

    pool = Pool(preprocess, run, Batcher(lambda job: False, batch_size=10, wait_s=0.01), threads=2, runs=2)
    pool.start()
    for i in range(50):
        release.clear()
        for job in ("quick", "slow") if i % 2 else ("slow", "quick"):
            pool.put(job)
        assert held.acquire(timeout=PATIENCE_S)
        assert ran.acquire(timeout=PATIENCE_S)
        assert done[-1] == "quick"
        release.set()
        assert ran.acquire(timeout=PATIENCE_S)
    pool.close()
    assert done == ["quick", "slow"] * 50


def test_no_more_batches_run_at_once_than_are_allowed():
    held = Held(threads=3, runs=1, size=1)
    for one in ("a", "b", "c"):
        held.pool.put(one)
    held.pool.start()
    for _ in range(3):
        assert held.began.acquire(timeout=PATIENCE_S)
    assert {what for what, *_ in held.done} == {"preprocess"}
    held.step()  # one is preprocessed, and runs; the others are preprocessed, and wait
    held.go.release(2)
    with held.pool.changed:
        held.pool.changed.wait_for(lambda: len(held.pool.batcher) == 2, 1.0)
    assert [what for what, *_ in held.done].count("run") == 1
    held.go.release(100)
    held.pool.close()
    assert sorted(job for what, job in held.done if what == "run") == ["a", "b", "c"]


@pytest.mark.parametrize("threads", [1, 4])
def test_a_pool_that_is_closed_does_first_what_it_was_given(threads):
    held = Held(threads=threads, runs=threads, size=7)
    held.go.release(10_000)
    held.pool.start()
    for i in range(500):
        held.pool.put(str(i))
    held.pool.close()
    assert sorted(int(job) for what, *jobs in held.done if what == "run" for job in jobs) == list(range(500))
    assert not held.pool.alive
