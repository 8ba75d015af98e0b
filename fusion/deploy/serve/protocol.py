"""uvicorn's HTTP protocol with bounds: on open connections, and on the size and time of a request's head."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fusion.deploy.serve.service import Service

MAX_HEAD = 32_768  # bytes
REFUSALS = {
    408: b"HTTP/1.1 408 Request Timeout",
    431: b"HTTP/1.1 431 Request Header Fields Too Large",
    503: b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1",
}


def protocol_of(service: Service) -> type[HttpToolsProtocol]:
    """The protocol of one service's connections."""

    class Bounded(HttpToolsProtocol):
        """pending: what the request in progress waits for; it is cancelled if the client leaves."""

        pending: "asyncio.Future[Any] | None" = None
        deadline: asyncio.TimerHandle | None = None
        in_head, head = True, 0  # whether a request's head is incomplete, and its bytes so far

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            service.connections += 1
            self.await_head()
            if service.connections > service.limits.max_connections:
                self.refuse(503, "connections")

        def connection_lost(self, exc: Exception | None) -> None:
            service.connections -= 1
            self.forget_deadline()
            if self.pending is not None:
                self.pending.cancel()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            super().data_received(data)
            if self.in_head:
                self.head += len(data)
                if self.deadline is None:
                    self.await_head()
                if self.head > MAX_HEAD:
                    self.refuse(431, "too_large")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self.scope["extensions"] = {"fusion.connection": self}  # type: ignore[dict-item]
            self.in_head, self.head = True, 0

        def on_headers_complete(self) -> None:
            self.in_head = False
            self.forget_deadline()
            super().on_headers_complete()

        def await_head(self) -> None:
            self.deadline = self.loop.call_later(service.limits.read_timeout_s, self.refuse, 408, "slow")

        def forget_deadline(self) -> None:
            if self.deadline is not None:
                self.deadline.cancel()
                self.deadline = None

        def refuse(self, status: int, reason: str) -> None:
            """Answers a connection of which no request has been read, and closes it."""
            self.forget_deadline()
            if self.transport.is_closing():
                return
            service.metrics.count(service.metrics.rejections, reason)
            service.metrics.count(service.metrics.requests, str(status), service.versions.main.name)
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(REFUSALS[status] + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()

    return Bounded
