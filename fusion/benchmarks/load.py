"""Load on a server: connections that send their next request as soon as the last one is answered. Run as a process of its own."""

import asyncio
import importlib.util
import json
import resource
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

CONTENT_LENGTH = b"content-length:"


@dataclass
class Measured:
    """What a load has measured. requests: answered with 200. failed: answered otherwise, or not as expected. cpu_s: of this process.

    latencies_ms: by percentile.
    """

    seconds: float = 0.0
    requests: int = 0
    failed: int = 0
    cpu_s: float = 0.0
    latencies_ms: dict[str, float] = field(default_factory=dict)
    first_failure: str = ""

    @property
    def per_second(self) -> float:
        return self.requests / self.seconds


class Load:
    """Requests to be sent, in turns, and how their answers are counted.

    Args:
        requests: whole HTTP requests.
        expected: for each, what its answer must contain; none is checked where there are none.
    """

    def __init__(self, requests: list[bytes], expected: list[bytes]) -> None:
        self.requests, self.expected = requests, expected or [b""] * len(requests)
        self.next, self.ended = 0, False
        self.latencies: list[float] = []
        self.failed, self.first_failure = 0, ""

    def take(self) -> int:
        self.next += 1
        return self.next % len(self.requests)

    def answered(self, number: int, answer: bytes, seconds: float) -> None:
        if answer.startswith(b"HTTP/1.1 200") and self.expected[number] in answer:
            self.latencies.append(seconds)
        else:
            self.failed += 1
            self.first_failure = self.first_failure or answer[:500].decode(errors="replace")


class Connection(asyncio.Protocol):
    """One keep-alive connection."""

    def __init__(self, load: Load, closed: "asyncio.Future[None]") -> None:
        self.load, self.closed, self.received, self.length = load, closed, b"", 0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.send()

    def send(self) -> None:
        if self.load.ended:
            self.transport.close()
            return
        self.received, self.length = b"", 0
        self.number, self.sent = self.load.take(), time.perf_counter()
        self.transport.write(self.load.requests[self.number])

    def data_received(self, data: bytes) -> None:
        self.received = self.received + data if self.received else data
        if not self.length:
            end = self.received.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self.received[:end].lower()
            at = head.find(CONTENT_LENGTH) + len(CONTENT_LENGTH)
            self.length = end + 4 + int(head[at:].split(b"\r\n", 1)[0])
        if len(self.received) >= self.length:
            self.load.answered(self.number, self.received, time.perf_counter() - self.sent)
            self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.load.ended:
            self.load.failed += 1
            self.load.first_failure = self.load.first_failure or f"connection lost: {exc}"
        if not self.closed.done():
            self.closed.set_result(None)


async def measure(url: str, load: Load, connections: int, seconds: float) -> Measured:
    """Loads a server for some seconds."""
    loop, parts = asyncio.get_running_loop(), urlsplit(url)
    closed: list[asyncio.Future[None]] = [loop.create_future() for _ in range(connections)]
    began, cpu = time.perf_counter(), time.process_time()
    for one in closed:
        await loop.create_connection(partial(Connection, load, one), parts.hostname or "", parts.port or 80)
    await asyncio.sleep(seconds)
    load.ended = True
    lasted, used = time.perf_counter() - began, time.process_time() - cpu
    latencies = sorted(load.latencies)
    places = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    shown = {name: 1000 * latencies[min(int(place * len(latencies)), len(latencies) - 1)] for name, place in places.items() if latencies}
    measured = Measured(lasted, len(latencies), load.failed, used, shown, load.first_failure)
    await asyncio.wait(closed, timeout=60)
    return measured


def main() -> None:
    """Reads url, connections, seconds and the file of requests from its arguments; prints what it measured as JSON."""
    url, connections, seconds, path = sys.argv[1:]
    stored = json.loads(Path(path).read_text())
    load = Load([one.encode("latin-1") for one in stored["requests"]], [one.encode() for one in stored["expected"]])
    loop_factory = importlib.import_module("uvloop" if importlib.util.find_spec("uvloop") else "asyncio").new_event_loop
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        print(json.dumps(asdict(runner.run(measure(url, load, int(connections), float(seconds))))))


if __name__ == "__main__":
    main()
