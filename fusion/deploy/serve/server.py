"""The process: binds the port, serves until a signal, drains, and ends."""

import asyncio
import contextlib
import errno
import logging
import math
import signal
import socket
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette

from fusion.console import print_rank_zero
from fusion.deploy.serve.limits import Limits
from fusion.deploy.serve.protocol import protocol_of
from fusion.deploy.serve.service import Service
from fusion.errors import UserError

BACKLOG = 2048
CLOSE_S = 5  # for the threads to end, once no request is in progress


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket of this address, which doesn't listen yet. Raises UserError for a port in use, and a host that isn't this machine's."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port is {port}; expected a number up to 65535, 0 for any")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise no_port(error, host, port) from None
    return bound


def listen(bound: socket.socket) -> None:
    """Accept connections. Raises UserError if another process has begun to listen on the same port in the meantime."""
    try:
        bound.listen(BACKLOG)
    except OSError as error:
        raise no_port(error, *bound.getsockname()[:2]) from None


def no_port(error: OSError, host: str, port: int) -> UserError:
    if error.errno == errno.EADDRINUSE:
        return UserError(f"port {port} of {host} is in use; choose another one: --port={port + 1}, or 0 for any")
    return UserError(f"can't listen on port {port} of {host}: {error.strerror or error}")


def drain_s(limits: Limits) -> int:
    """The longest time in which a request that has begun is answered: it is read, and waits."""
    return math.ceil(limits.read_timeout_s + limits.timeout_s) + 1


class Server(uvicorn.Server):
    """uvicorn's server, which on SIGTERM and SIGINT answers what it has admitted and then ends with status 0."""

    def __init__(self, app: Starlette, service: Service) -> None:
        self.service = service
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol_of(service),
                ws="none",
                loop="uvloop",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=int(service.limits.keep_alive_s),
                timeout_graceful_shutdown=drain_s(service.limits),
                backlog=BACKLOG,
            )
        )
        logging.getLogger("uvicorn").setLevel(logging.ERROR)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In place of uvicorn's, which ends the process by the same signal once it has drained."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.drain, number)
        yield

    def drain(self, number: int) -> None:
        """Take no more connections; after a second signal, wait for nothing that is in progress."""
        if self.service.draining:
            self.force_exit = True
        else:
            print_rank_zero(f"{signal.Signals(number).name}: answering {self.service.depth} requests in progress")
        self.service.draining = self.should_exit = True

    async def serve_until_signal(self, bound: socket.socket) -> None:
        self.service.start()
        await self.serve(sockets=[bound])
        await asyncio.to_thread(self.service.close, 0 if self.force_exit else CLOSE_S)


def url_of(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
