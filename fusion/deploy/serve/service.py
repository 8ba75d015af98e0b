"""The path of a request: admitted, decoded in the pool, batched, answered by its version, compared, counted."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fusion.deploy.serve.answers import Answer, agree
from fusion.deploy.serve.batcher import Batcher, Row, Waiting
from fusion.deploy.serve.fetching import Fetcher
from fusion.deploy.serve.limits import Limits, Rejected, overloaded
from fusion.deploy.serve.metrics import Metrics
from fusion.deploy.serve.pool import Pool
from fusion.deploy.serve.requests import values_of
from fusion.deploy.serve.versions import Version, Versions
from fusion.errors import first_line

LOG = logging.getLogger("fusion")
FAILED = "failed"  # the reason of rejections that are the model's fault
RATE_S = 10.0  # over which the rate of answers is measured, for Retry-After
Result = Answer | Rejected


@dataclass(slots=True, eq=False)
class Job:
    """A request on its way, or a copy of one for a comparison, which nobody waits for and which has no future.

    body: empty once the request has ended. twin: the copy, or of which it is one. result: once the version has answered.
    """

    id: str
    version: Version
    body: bytes
    content_type: str
    since: float
    future: "asyncio.Future[Answer] | None"
    twin: "Job | None" = None
    result: Result | None = None

    @property
    def is_copy(self) -> bool:
        return self.future is None

    @property
    def is_gone(self) -> bool:
        return self.future is not None and self.future.done()


class Service:
    """Answers requests with the versions' models. Its methods are called by the event loop's thread.

    Args:
        versions: what is served.
        limits: on requests and on the work in progress.
        batch_size: the largest batch.
        wait_ms: the longest time for which a sample waits for others while a thread is idle.
        runs: number of batches that are run at once.
        threads: number of threads that preprocess requests and run batches.
        url_hosts: hosts from which images may be fetched.
    """

    def __init__(
        self,
        versions: Versions,
        limits: Limits,
        *,
        batch_size: int = 32,
        wait_ms: float = 5.0,
        runs: int = 1,
        threads: int = 2,
        url_hosts: Sequence[str] = (),
    ) -> None:
        self.versions, self.limits, self.metrics = versions, limits, Metrics()
        batcher = Batcher(lambda job: job.is_gone, batch_size=batch_size, wait_s=wait_ms / 1000)
        self.pool = Pool(self.decode, self.run, batcher, threads=threads, runs=runs)
        self.fetcher = Fetcher(url_hosts, limits)
        self.depth = self.copies = self.copied = self.memory = self.connections = 0  # copied: bytes of the copies in progress
        self.draining = False
        self.ended: deque[float] = deque(maxlen=1000)  # times of the last answers
        self.metrics.watch(lambda: self.depth, lambda: self.connections)
        self.show_shares()

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.pool.start()

    def close(self, wait_s: float | None = None) -> None:
        """End all threads once they have done what was admitted, but wait for that no longer than this."""
        self.pool.close(wait_s)
        self.fetcher.close()

    @property
    def alive(self) -> bool:
        """Whether all threads run."""
        return self.pool.alive

    # Admission

    def admit(self) -> None:
        """Raises Rejected while too many requests are in progress."""
        self.check_depth()
        if self.memory >= self.limits.max_memory:
            raise overloaded("memory", "the requests in progress are too large", self.depth, self.rate())

    def check_depth(self) -> None:
        if self.depth >= self.limits.max_queue:
            raise overloaded("queue", "too many requests are in progress", self.depth, self.rate())

    def rate(self) -> float:
        """Answers per second, of late."""
        now = time.monotonic()
        recent = sum(1 for ended in self.ended if ended > now - RATE_S)
        return recent / min(RATE_S, now - self.ended[0]) if recent and now > self.ended[0] else 0.0

    def submit(self, id: str, body: bytes, content_type: str) -> Job:
        """Admits a request; its future gets an Answer or Rejected. `leave` must be called once it is done. Raises Rejected."""
        self.check_depth()  # again, since its body was read after `admit`
        version = self.versions.route(id)
        job = Job(id, version, body, content_type, time.monotonic(), self.loop.create_future())
        self.depth += 1
        self.pool.put(job)
        other = self.versions.compared_with(version)
        if other is not None:
            self.copy(job, other)
        return job

    def copy(self, job: Job, version: Version) -> None:
        """Sends a copy to another version, which is the first thing to be shed: long before a request is."""
        too_many = self.depth > self.limits.max_queue // 2 or self.copies >= max(self.limits.max_queue // 4, 1)
        if too_many or self.copied + len(job.body) > self.limits.max_memory // 4:
            self.metrics.count(self.metrics.rejections, "shadow")
            return
        self.copies += 1
        self.copied += len(job.body)
        job.twin = Job(job.id, version, job.body, job.content_type, job.since, None, twin=job)
        self.pool.put(job.twin, second=True)

    def leave(self, job: Job) -> None:
        """The request has ended, with or without an answer."""
        self.depth -= 1
        if job.future is not None and not job.future.done():
            job.future.cancel()
        job.body = b""  # which the job keeps until a thread takes it

    # In the pool's threads

    def decode(self, job: Job) -> Waiting | None:
        """Preprocesses a request. None for one that has ended, or of which images are still to be fetched."""
        body = job.body  # before it is asked whether the request has ended, which empties it
        if job.is_gone:
            return None
        try:
            values = values_of(body, job.content_type, job.version.inputs, self.limits)
            return None if self.fetcher.start(values, partial(self.fetched, job)) else self.waiting(job, values)
        except Rejected as rejected:
            self.deliver([job], [rejected])
        except Exception as error:
            self.deliver([job], [failed(job.version, error)])
        return None

    def waiting(self, job: Job, values: dict[str, Any]) -> Waiting:
        return Waiting(job.version, job.version.row(values), job, second=job.is_copy)

    def fetched(self, job: Job, values: dict[str, Any] | Rejected) -> None:
        """In a thread that has fetched images: preprocesses the request."""
        try:
            if isinstance(values, Rejected):
                raise values
            self.pool.add([self.waiting(job, values)])
        except Rejected as rejected:
            self.deliver([job], [rejected])
        except Exception as error:
            self.deliver([job], [failed(job.version, error)])

    def run(self, batch: list[Waiting]) -> None:
        """Answers a batch. If the model fails, each sample is tried alone, so that one costs the others nothing."""
        version: Version = batch[0].job.version
        jobs, rows = [one.job for one in batch], [one.row for one in batch]
        began = time.perf_counter()
        results: list[Result]
        try:
            results = [answer or not_finite(version) for answer in version.answers(rows)]
        except Exception as error:
            results = [failed(version, error)] if len(rows) == 1 else [self.alone(version, row) for row in rows]
        seconds = time.perf_counter() - began
        self.metrics.batch_size.observe(len(rows))
        self.metrics.batch_seconds.labels(version.name).observe(seconds)
        self.deliver(jobs, results)

    def alone(self, version: Version, row: Row) -> Result:
        try:
            return version.answers([row])[0] or not_finite(version)
        except Exception as error:
            return failed(version, error)

    def deliver(self, jobs: list[Job], results: list[Result]) -> None:
        self.loop.call_soon_threadsafe(self.delivered, jobs, results)

    # In the event loop again

    def delivered(self, jobs: list[Job], results: list[Result]) -> None:
        """Passes results to those who wait for them, and then counts them."""
        now, versions = time.monotonic(), [job.version for job in jobs]
        for job, result in zip(jobs, results, strict=True):
            self.settle(job, result, now)
        for job, version, result in zip(jobs, versions, results, strict=True):
            self.record(job, version, result, now)

    def settle(self, job: Job, result: Result, now: float) -> None:
        """Ends a job with its result; a request whose canary fails goes to the main version instead."""
        if job.future is None:
            self.copies -= 1
            self.copied -= len(job.body)
        elif job.future.done():
            return
        elif isinstance(result, Answer):
            self.ended.append(now)
            self.metrics.answered(result)
            job.future.set_result(result)
        elif result.reason == FAILED and job.version is not self.versions.main:
            if job.twin is not None:  # there is nothing to compare any more
                job.twin.twin = None
            job.version, job.twin = self.versions.main, None
            self.pool.put(job)
        else:
            job.future.set_exception(result)

    def record(self, job: Job, version: Version, result: Result, now: float) -> None:
        """Adds an outcome to the version's watch, and rolls it back if it exceeds a limit."""
        has_failed = isinstance(result, Rejected) and result.reason == FAILED
        if has_failed:
            self.metrics.count(self.metrics.failures, version.name)
        if version.watch is not None:
            version.watch.ended(failed=has_failed, seconds=None if job.is_copy else now - job.since)
            self.judge(version)
        job.result = result
        twin = job.twin
        if twin is not None and isinstance(result, Answer) and isinstance(twin.result, Answer):
            newer = version if version is not self.versions.main else twin.version
            agreed = agree(result.answer, twin.result.answer)
            self.metrics.count(self.metrics.comparisons, newer.name)
            if not agreed:
                self.metrics.count(self.metrics.disagreements, newer.name)
            if newer.watch is not None:
                newer.watch.compared(agreed=agreed)
                self.judge(newer)

    def judge(self, version: Version) -> None:
        verdict = self.versions.judge(version)
        if verdict is not None:
            LOG.warning("%s is rolled back: %s", version.name, verdict.message)
            self.metrics.count(self.metrics.rollbacks, version.name, verdict.reason)
            self.show_shares()

    def show_shares(self) -> None:
        """Sets the gauge of the versions' shares."""
        self.metrics.share.clear()
        shares = dict(self.versions.canaries)
        for version, role in self.versions.roles().items():
            share = shares.get(version, 1 - sum(shares.values()) if role == "main" else 0.0)
            self.metrics.share.labels(version.name, role).set(share)


def failed(version: Version, error: Exception) -> Rejected:
    """The answer to a request for which the model failed; the error goes to the log alone."""
    LOG.warning("%s failed: %s: %s", version.name, type(error).__name__, first_line(error))
    return Rejected(500, FAILED, "the model failed for this sample")


def not_finite(version: Version) -> Rejected:
    LOG.warning("%s failed: its output is not finite", version.name)
    return Rejected(500, FAILED, "the model's output for this sample is not finite")
