"""uvicorn's HTTP protocol with bounds: on open connections, on the size and time of a request's head, and on requests sent ahead."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fusion.deploy.serve.service import Service

MAX_HEAD = 32_768  # bytes of a request's line, headers and trailers
MAX_AHEAD = 16  # requests that wait behind another one of the same connection
REFUSALS = {
    400: b"HTTP/1.1 400 Bad Request",
    408: b"HTTP/1.1 408 Request Timeout",
    431: b"HTTP/1.1 431 Request Header Fields Too Large",
    503: b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1",
}


class Refused(Exception):
    """Ends the parsing of what has been received."""


def protocol_of(service: Service) -> type[HttpToolsProtocol]:
    """The protocol of one service's connections."""

    class Bounded(HttpToolsProtocol):
        """pending: what the request in progress waits for; it is cancelled if the client leaves."""

        pending: "asyncio.Future[Any] | None" = None
        deadline: asyncio.TimerHandle | None = None  # of a head, of anything else that is sent after an answer, or of a close
        stall: asyncio.TimerHandle | None = None  # of a client that doesn't read
        refused = False  # nothing more is read
        in_head, head = True, 0  # whether a request's head is incomplete; the bytes of what has been read of head and trailers
        part = 0  # bytes of the reads that lay within one header, and so have not been added to head

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            service.connections += 1
            self.await_more()
            if service.connections > service.limits.max_connections:
                self.refuse(503, "connections")

        def connection_lost(self, exc: Exception | None) -> None:
            service.connections -= 1
            self.forget_deadline()
            self.forget_stall()
            if self.pending is not None:
                self.pending.cancel()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.refused or self.transport.is_closing():
                return
            self.part += len(data)
            super().data_received(data)
            if self.part > MAX_HEAD:
                self.refuse(431, "too_large")
            elif self.deadline is None and (self.in_head or (self.cycle is not None and self.cycle.response_complete)):
                self.await_more()  # uvicorn's own timer of idle connections ends with any byte

        # What the parser finds

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self.scope["extensions"] = {"fusion.connection": self}  # type: ignore[dict-item]
            self.in_head, self.head, self.part = True, 0, 0

        def on_url(self, url: bytes) -> None:
            self.add(len(url))
            super().on_url(url)

        def on_header(self, name: bytes, value: bytes) -> None:
            self.add(len(name) + len(value) + 4)  # with ": " and the end of the line
            if self.in_head:  # a trailer is no header
                super().on_header(name, value)

        def add(self, size: int) -> None:
            self.part = 0
            self.head += size
            if self.head > MAX_HEAD:
                self.refuse(431, "too_large")
                raise Refused

        def on_headers_complete(self) -> None:
            if len(self.pipeline) >= MAX_AHEAD:
                self.refuse(503, "ahead")
                raise Refused
            self.in_head, self.part = False, 0
            self.forget_deadline()
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self.part = 0
            super().on_body(body)

        def send_400_response(self, msg: str) -> None:
            self.refuse(400, "malformed")

        # Deadlines

        def await_more(self) -> None:
            self.deadline = self.loop.call_later(service.limits.read_timeout_s, self.late)

        def late(self) -> None:
            self.deadline = None
            if self.cycle is not None and not self.cycle.response_complete:  # what comes after it may not even be read yet
                self.await_more()
            elif self.in_head:
                self.refuse(408, "slow")
            else:
                self.close()

        def forget_deadline(self) -> None:
            if self.deadline is not None:
                self.deadline.cancel()
                self.deadline = None

        # Ends

        def refuse(self, status: int, reason: str) -> None:
            """Reads no more, and closes the connection: with this answer, or after those to the requests that came before."""
            if self.refused or self.transport.is_closing():
                return
            self.refused = True
            self.forget_deadline()
            service.metrics.count(service.metrics.rejections, reason)
            service.metrics.count(service.metrics.requests, str(status), service.versions.main.name)
            cycle = self.cycle
            if cycle is not None and not cycle.response_complete and (self.pipeline or cycle.response_started or not cycle.more_body):
                cycle.keep_alive = False
                return
            self.transport.write(REFUSALS[status] + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            self.close()

        def close(self) -> None:
            """Once what has been written is sent; but a client that doesn't read is not waited for."""
            self.forget_deadline()
            self.transport.close()
            self.deadline = self.loop.call_later(service.limits.read_timeout_s, self.transport.abort)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.transport.is_closing():
                self.close()

        def timeout_keep_alive_handler(self) -> None:
            self.close()

        def pause_writing(self) -> None:
            super().pause_writing()
            self.stall = self.loop.call_later(service.limits.read_timeout_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self.forget_stall()

        def forget_stall(self) -> None:
            if self.stall is not None:
                self.stall.cancel()
                self.stall = None

    return Bounded
