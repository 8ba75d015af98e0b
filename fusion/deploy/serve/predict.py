"""POST /predict as an ASGI application: one sample in, its answer out."""

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fusion.deploy.serve.limits import Rejected, overloaded
from fusion.deploy.serve.service import Job, Service

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

LEFT = 499  # the status by which clients that leave are counted
MAX_ID = 200  # characters
DISCARDED = 8  # bodies' worth of bytes that are read of a body that is too large, so that the client gets to read why


class Left(Exception):
    """The client has closed its connection."""


class Predict:
    """Answers a request. Written against ASGI itself, which for a small model takes half the time of a framework's request and response."""

    def __init__(self, service: Service) -> None:
        self.service, self.metrics = service, service.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        headers: dict[bytes, bytes] = dict(scope["headers"])
        id = headers.get(b"x-request-id", b"").decode("latin-1") or os.urandom(8).hex()
        connection = (scope.get("extensions") or {}).get("fusion.connection")
        job: Job | None = None
        body = Body(self.service, receive)
        try:
            try:
                if len(id) > MAX_ID:
                    raise Rejected(400, "malformed", f"x-request-id has {len(id)} characters, limit {MAX_ID}")
                self.service.admit()
                job = self.service.submit(id, await body.read(headers), headers.get(b"content-type", b"").decode("latin-1"))
                try:
                    answer = await self.answer(job, connection)
                finally:  # before the answer is sent, so that a client that doesn't read it takes no place in the queue
                    self.service.leave(job)
                    body.release()
                await respond(send, 200, id, b'{"id": %s, %s' % (json.dumps(id).encode(), answer.json))
                self.count(200, job.version.name, began)
            except Rejected as rejected:
                await body.skip(headers, rejected)
                await self.reject(send, rejected, id, close=not body.ended)
                self.count(rejected.status, job.version.name if job else "", began)
        except Left:
            self.metrics.count(self.metrics.rejections, "left")
            self.count(LEFT, job.version.name if job else "", began)
        finally:
            body.release()

    async def answer(self, job: Job, connection: Any) -> Any:
        """The job's answer. Raises Rejected, and Left when the connection was lost, which cancels the future."""
        assert job.future is not None
        timeout_s = self.service.limits.timeout_s
        if connection is not None:
            connection.pending = job.future
            if not connection.pipeline:  # after a large body nothing is read any more, not even that the client has left
                connection.flow.resume_reading()
        try:
            async with asyncio.timeout(timeout_s):
                return await job.future
        except TimeoutError:
            raise overloaded("timeout", f"the answer took longer than {timeout_s:g} s", self.service.depth, self.service.rate()) from None
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            raise Left from None
        finally:
            if connection is not None:
                connection.pending = None

    async def reject(self, send: Send, rejected: Rejected, id: str, *, close: bool) -> None:
        self.metrics.count(self.metrics.rejections, rejected.reason)
        extra = [] if rejected.retry_after_s is None else [(b"retry-after", str(rejected.retry_after_s).encode())]
        extra += [(b"connection", b"close")] if close else []
        await respond(send, rejected.status, id, json.dumps({"id": id, "error": rejected.message}).encode(), extra)

    def count(self, status: int, version: str, began: float) -> None:
        self.metrics.count(self.metrics.requests, str(status), version or self.service.versions.main.name)
        self.metrics.seconds.observe(time.perf_counter() - began)


class Body:
    """A request's body, read within the limits. ended: whether all of it has been read."""

    def __init__(self, service: Service, receive: Receive) -> None:
        self.service, self.receive = service, receive
        self.size, self.ended = 0, False

    async def read(self, headers: dict[bytes, bytes]) -> bytes:
        """All of it. Raises Rejected for one that is too large, too slow or compressed; Left."""
        limits = self.service.limits
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise Rejected(415, "content_type", "the body is compressed; expected it as it is")
        announced = headers.get(b"content-length", b"")
        try:
            async with asyncio.timeout(limits.read_timeout_s):
                if announced.isdigit() and int(announced) > limits.max_body:
                    if b"expect" not in headers:
                        await self.discard()
                    raise self.too_large()
                return await self.chunks()
        except TimeoutError:
            raise Rejected(408, "slow", f"the body took longer than {limits.read_timeout_s:g} s") from None

    async def chunks(self) -> bytes:
        first = await self.chunk()
        if self.ended:
            return first
        parts = [first]
        while not self.ended:
            parts.append(await self.chunk())
            if self.size > self.service.limits.max_body:
                parts.clear()
                await self.discard()
                raise self.too_large()
            if not self.ended and self.service.memory > self.service.limits.max_memory:
                raise overloaded("memory", "the requests in progress are too large")
        return b"".join(parts)

    async def chunk(self, *, kept: bool = True) -> bytes:
        message = await self.receive()
        if message["type"] == "http.disconnect":
            raise Left
        self.ended = not message.get("more_body", False)
        content: bytes = message.get("body", b"")
        if kept:
            self.size += len(content)
            self.service.memory += len(content)
        return content

    async def discard(self) -> None:
        """Read on, so that the client, which reads nothing before it has sent everything, gets an answer; but not for ever."""
        self.release()
        left = DISCARDED * self.service.limits.max_body
        while not self.ended and left > 0:
            left -= len(await self.chunk(kept=False))

    async def skip(self, headers: dict[bytes, bytes], rejected: Rejected) -> None:
        """Discards what the client still sends of a rejected request, since it may not read the answer before. Raises Left.

        Not a body that was too slow or too large, and not one for which the client waits to be asked.
        """
        self.release()
        announced = headers.get(b"content-length", b"")
        is_large = announced.isdigit() and int(announced) > self.service.limits.max_body
        if self.ended or is_large or rejected.status in (408, 413) or b"expect" in headers:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.service.limits.read_timeout_s):
                await self.discard()

    def too_large(self) -> Rejected:
        return Rejected(413, "too_large", f"the body is too large, limit {self.service.limits.max_body_mb:g} MB")

    def release(self) -> None:
        """The body is no longer in memory."""
        self.service.memory -= self.size
        self.size = 0


async def respond(send: Send, status: int, id: str, body: bytes, extra: list[tuple[bytes, bytes]] | None = None) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", id.encode("latin-1", "replace")),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers + (extra or [])})
    await send({"type": "http.response.body", "body": body})
