"""A model whose batches a test can hold and fail, a server around it, and the requests of the tests."""

import asyncio
import base64
import contextlib
import io
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

import httpx
import numpy as np
from PIL import Image

from fusion.deploy.serve.app import app_of
from fusion.deploy.serve.canary import RollbackLimits
from fusion.deploy.serve.control import Control
from fusion.deploy.serve.limits import Limits
from fusion.deploy.serve.model import Loaded
from fusion.deploy.serve.server import Server, bound_socket
from fusion.deploy.serve.service import Service
from fusion.deploy.serve.versions import Version, Versions
from fusion.errors import UserError
from fusion.predictions import Output, Predictions
from fusion.processing.image import ImagePreprocessor
from fusion.processing.images import ImageSpec
from fusion.processing.preprocessor import TextArrays

CLASSES = ["even", "odd"]
JSON = {"content-type": "application/json"}
PATIENCE_S = 30  # after which a test that waits has failed


class Characters:
    """Texts as the codes of their characters."""

    form = "text"

    def raw(self, values: Any, name: str) -> list[Any]:
        return list(values)

    def batch(self, cells: Sequence[Any], unreadable: dict[int, UserError]) -> TextArrays:
        return self.concat([codes_of(cell) for cell in cells])

    def concat(self, parts: Sequence[TextArrays]) -> TextArrays:
        longest = max(part.ids.shape[1] for part in parts)
        ids, mask = (
            np.concatenate([np.pad(one, ((0, 0), (0, longest - one.shape[1]))) for one in arrays]) for arrays in zip(*parts, strict=True)
        )
        return TextArrays(ids, mask)


def codes_of(text: str | None) -> TextArrays:
    codes = [ord(character) for character in text or ""] or [0]
    return TextArrays(np.array([codes], dtype=np.int64), np.full((1, len(codes)), text is not None))


class Parity:
    """Answers whether the sum of a sample's characters and pixels is even.

    gate: closed, batches wait in the model. batches: the texts' lengths of each batch that was begun. fails: texts for which it fails
    (a batch with such a text raises). inverted: answers the opposite. nan: for all.
    """

    def __init__(self, *, fails: Sequence[str] = (), inverted: bool = False, nan: bool = False) -> None:
        spec = ImageSpec((8, 8), interpolation="nearest", max_megapixels=1.0)
        self.preprocessors: dict[str, Any] = {"image": ImagePreprocessor(spec), "text": Characters()}
        self.names = list(CLASSES)
        self.gate, self.began = threading.Event(), threading.Semaphore(0)
        self.gate.set()
        self.batches: list[list[str]] = []
        self.fails, self.inverted, self.nan = set(fails), inverted, nan

    def run(self, inputs: Mapping[str, Any]) -> Output:
        texts, images = inputs["text"], inputs["image"]
        held = ["".join(map(chr, row[mask])) for row, mask in zip(texts.ids, texts.mask, strict=True)]
        self.batches.append(held)
        self.began.release()
        assert self.gate.wait(PATIENCE_S)
        if self.fails & set(held):
            raise RuntimeError("the model fails for this text")
        sums = (texts.ids * texts.mask).sum(1) + images.pixels.astype(np.int64).sum((1, 2, 3)) * images.present + self.inverted
        odd = np.where(sums % 2 == 1, 0.75, 0.25).astype(np.float32)
        values = np.stack([1 - odd, odd], axis=1) * (np.nan if self.nan else 1)
        return values.astype(np.float32), {"image": images.present, "text": texts.present}

    def gather(self, outputs: Any) -> Predictions:
        ((values, present),) = outputs
        return Predictions([CLASSES[i] for i in values.argmax(1)], values, CLASSES, present)

    def confidence(self, values: np.ndarray) -> np.ndarray:
        return values.max(axis=1)

    def wait_for_batch(self) -> None:
        """Until a batch has entered the model."""
        assert self.began.acquire(timeout=PATIENCE_S)


def parity_of(text: str | None, pixels: np.ndarray | None = None) -> str:
    """The answer of Parity, by Python's own arithmetic."""
    total = sum(map(ord, text or "")) + (0 if pixels is None else int(pixels.astype(int).sum()))
    return CLASSES[total % 2]


def version_of(model: Any, name: str) -> Version:
    return Version(Loaded(model, name), name)


def service_of(model: Any = None, *, limits: Limits | None = None, rollback: RollbackLimits | None = None, **options: Any) -> Service:
    """A service of one version, "main", whose threads haven't been started."""
    versions = Versions(version_of(model or Parity(), "main"), rollback or RollbackLimits())
    return Service(versions, limits or Limits(), **{"batch_size": 4, "wait_ms": 1.0, "runs": 1, "threads": 2} | options)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def picture(seed: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def asked(service: Service, ask: Callable[[httpx.AsyncClient], Awaitable[Any]], load: Any = None) -> Any:
    """What a coroutine returns that asks the application by a client, without sockets. load: of the control commands."""

    async def run() -> Any:
        app = app_of(service, Control(service, load or (lambda path: Loaded(Parity(), str(path))), 4))
        service.start()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            try:
                return await asyncio.wait_for(ask(client), PATIENCE_S)
            finally:
                await asyncio.to_thread(service.close)

    return asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    """Waits until a condition holds, which the test's own actions must bring about."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.001)


class InThread(Server):
    """A server outside the main thread, which alone gets signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def listening(service: Service, load: Any = lambda path: Loaded(Parity(), str(path))) -> Iterator[tuple[str, int]]:
    """Host and port of a server with real sockets, in a thread. load: of the control commands."""
    bound = bound_socket("127.0.0.1", 0)
    bound.listen(100)
    server = InThread(app_of(service, Control(service, load, 4)), service)
    thread = threading.Thread(target=asyncio.run, args=[server.serve_until_signal(bound)], daemon=True)
    thread.start()
    try:
        yield bound.getsockname()[:2]
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def post(body: bytes, *headers: str) -> bytes:
    """A request to /predict as it is sent."""
    lines = ["POST /predict HTTP/1.1", "host: localhost", "content-type: application/json", f"content-length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def exchange(address: tuple[str, int], sent: bytes, *, timeout: float = PATIENCE_S) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of the answer to what is sent over a connection of its own; status 0 where it is closed without one."""
    with socket.create_connection(address, timeout=timeout) as connection:
        connection.sendall(sent)
        return answer_on(connection)


def answer_on(connection: socket.socket) -> tuple[int, dict[str, str], Any]:
    received = b""
    while b"\r\n\r\n" not in received:
        chunk = connection.recv(65536)
        if not chunk:
            return 0, {}, None
        received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    while len(body) < int(headers.get("content-length", 0)):
        body += connection.recv(65536)
    return int(lines[0].split()[1]), headers, json.loads(body) if body else None


def counted(service: Service, name: str, **labels: str) -> float:
    """The value of a metric, 0 where it has none."""
    return service.metrics.registry.get_sample_value(name, labels) or 0.0
