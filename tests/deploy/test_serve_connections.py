"""What one connection may take: of memory, of time, and of the queue; and the end of the process."""

import asyncio
import contextlib
import math
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from serving import JSON, PATIENCE_S, Parity, answer_on, asked, counted, exchange, listening, parity_of, post, service_of, version_of
from test_serve_http import A, wait_for

from fusion.deploy.serve.app import app_of
from fusion.deploy.serve.control import Control
from fusion.deploy.serve.limits import Limits
from fusion.deploy.serve.predict import Predict
from fusion.deploy.serve.protocol import MAX_AHEAD
from fusion.deploy.serve.server import CLOSE_S, Server

HERE = Path(__file__).parent
CHUNKED = post(b"", "transfer-encoding: chunked").replace(b"content-length: 0\r\n", b"")


def text_of(size):
    return b'{"text": "%s"}' % (b"a" * size)


def all_of(connection):
    """What comes until the server closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while chunk := connection.recv(65536):
            received += chunk
    return received


# Memory


@pytest.mark.parametrize("trailers", [b"a: b\r\n" * 8000, b"a: " + b"b" * 500_000], ids=["many", "long"])
def test_trailers_count_as_the_head_does(trailers):
    with listening(service_of()) as address, socket.create_connection(address, timeout=5) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(CHUNKED + b"1\r\n{\r\n0\r\n" + trailers)
        assert all_of(connection).startswith(b"HTTP/1.1 431")
        assert exchange(address, A)[0] == 200


def test_a_trailer_is_no_header():
    with listening(service_of()) as address:
        body = b'{"text": "a"}'
        status, headers, _ = exchange(address, CHUNKED + b"%x\r\n%s\r\n0\r\nx-request-id: trailer\r\n\r\n" % (len(body), body))
    assert (status, headers["x-request-id"] != "trailer") == (200, True)


def test_of_the_requests_sent_ahead_only_a_few_are_kept():
    model = Parity()
    service = service_of(model)
    with listening(service) as address, socket.create_connection(address, timeout=30) as connection:
        model.gate.clear()
        connection.sendall(A + b"GET /healthz HTTP/1.1\r\n\r\n" * 2000)
        wait_for(lambda: counted(service, "fusion_rejections_total", reason="ahead") == 1)
        assert service.depth == 1
        model.gate.set()
        received = all_of(connection)
    assert received.count(b"HTTP/1.1 200") == received.count(b"HTTP/1.1") == 1 + MAX_AHEAD
    assert received.count(b"connection: close") == 1


# Requests sent ahead


def test_a_head_sent_ahead_is_not_charged_for_the_body_before_it():
    service = service_of(limits=Limits(max_text=100_000))
    with listening(service) as address, socket.create_connection(address, timeout=30) as connection:
        connection.sendall(post(text_of(50_000)) + A[:20])
        assert answer_on(connection)[0] == 200
        connection.sendall(A[20:])
        assert answer_on(connection)[0] == 200


def test_a_head_sent_ahead_has_its_time_once_the_requests_before_it_are_answered():
    model = Parity()
    service = service_of(model, limits=Limits(read_timeout_s=0.3))
    with listening(service) as address, socket.create_connection(address, timeout=30) as connection:
        model.gate.clear()
        connection.sendall(A + A[:20])
        model.wait_for_batch()
        time.sleep(0.5)
        assert service.depth == 1
        connection.sendall(A[20:])
        time.sleep(0.05)
        model.gate.set()
        received = b""
        while received.count(b"HTTP/1.1 200") < 2 and (chunk := connection.recv(65536)):
            received += chunk
        assert received.count(b"HTTP/1.1 200") == received.count(b"HTTP/1.1") == 2


@pytest.mark.parametrize(
    "ahead",
    [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nx: " + b"a" * 40_000 + b"\r\n\r\n", CHUNKED + b"nonsense"],
    ids=["head", "large", "body"],
)
def test_a_wrong_request_sent_ahead_costs_the_one_before_it_nothing(ahead):
    model = Parity()
    service = service_of(model, limits=Limits(read_timeout_s=0.3))
    with listening(service) as address, socket.create_connection(address, timeout=30) as connection:
        model.gate.clear()
        connection.sendall(A)
        model.wait_for_batch()
        connection.sendall(ahead)
        wait_for(lambda: sum(counted(service, "fusion_rejections_total", reason=one) for one in ("malformed", "too_large")) == 1)
        assert service.depth == 1
        model.gate.set()
        received = all_of(connection)
        assert received.startswith(b"HTTP/1.1 200")
        assert parity_of("a").encode() in received
        assert b"connection: close" in received


# Time


@pytest.mark.parametrize(
    ("request_", "more"),
    [(A, b"\r\n"), (b"GET /healthz HTTP/1.1\r\ncontent-length: 5\r\n\r\n", b"1")],
    ids=["line", "body"],
)
def test_a_byte_after_an_answer_keeps_no_connection_open(request_, more):
    service = service_of(limits=Limits(read_timeout_s=0.2))
    with listening(service) as address, socket.create_connection(address, timeout=5) as connection:
        connection.sendall(request_)
        assert b"HTTP/1.1 200" in connection.recv(65536)
        time.sleep(0.1)
        connection.sendall(more)
        assert all_of(connection).count(b"HTTP/1.1") == 0
        wait_for(lambda: service.connections == 0)


def test_a_client_that_never_reads_keeps_no_connection_open():
    service = service_of(limits=Limits(read_timeout_s=0.3))
    with listening(service) as address, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(address)
        connection.setblocking(False)
        wait_for(lambda: service.connections == 1)
        request, sent, end = b"GET /docs HTTP/1.1\r\n\r\n", 0, time.monotonic() + 10
        while service.connections and time.monotonic() < end:
            try:
                sent += connection.send((request * 8)[sent % len(request) :])
                time.sleep(0.005)  # so that no more are sent ahead than are kept
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                break
        wait_for(lambda: service.connections == 0)


def test_a_client_that_does_not_read_its_answer_takes_no_place_in_the_queue():
    service = service_of()

    async def ask(_):
        sending = asyncio.Event()

        async def receive():
            return {"type": "http.request", "body": b'{"text": "a"}'}

        async def send(_):
            sending.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(Predict(service)({"headers": [(b"content-type", b"application/json")]}, receive, send))
        await sending.wait()
        found = service.depth, service.memory
        task.cancel()
        await asyncio.wait([task])
        return found

    assert asked(service, ask) == (0, 0)
    assert (service.depth, service.memory) == (0, 0)


# Clients that leave


def test_a_client_that_leaves_after_a_large_body_is_noticed_and_its_body_forgotten():
    model = Parity()
    service = service_of(model, batch_size=1, threads=1, limits=Limits(max_text=1_000_000))
    with listening(service) as address, contextlib.ExitStack() as stack:
        model.gate.clear()
        held = stack.enter_context(socket.create_connection(address, timeout=30))
        held.sendall(A)
        model.wait_for_batch()
        leaving = [socket.create_connection(address, timeout=30) for _ in range(5)]
        for one in leaving:
            one.sendall(post(text_of(200_000)))
        wait_for(lambda: service.depth == 6)
        jobs = list(service.pool.jobs[False])
        assert [len(job.body) for job in jobs] == [len(text_of(200_000))] * 5
        for one in leaving:
            one.close()
        wait_for(lambda: service.depth == 1)
        assert [job.body for job in jobs] == [b""] * 5
        wait_for(lambda: service.memory == len(b'{"text": "a"}'))
        model.gate.set()
        assert answer_on(held)[0] == 200
        assert model.batches == [["a"]]


# Overload


def test_a_large_body_is_read_before_it_is_shed():
    model = Parity()
    service = service_of(model, limits=Limits(max_queue=1))
    with listening(service) as address, contextlib.ExitStack() as stack:
        model.gate.clear()
        held, shed = (stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(2))
        held.sendall(A)
        model.wait_for_batch()
        for _ in range(3):  # over the same connection
            shed.sendall(post(text_of(5_000_000)))
            status, headers, _ = answer_on(shed)
            assert (status, "retry-after" in headers, "connection" in headers) == (503, True, False)
        assert service.memory == len(b'{"text": "a"}')
        shed.sendall(post(text_of(5_000_000), "expect: 100-continue")[:-5_000_000])
        status, headers, _ = answer_on(shed)
        assert (status, headers["connection"]) == (503, "close")
        model.gate.set()
        assert answer_on(held)[0] == 200


def test_copies_are_shed_by_the_memory_they_take():
    shadow = Parity()
    service = service_of(runs=2, limits=Limits(max_memory_mb=0.4, max_text=100_000))
    service.versions.add_shadow(version_of(shadow, "new"))
    shadow.gate.clear()

    async def ask(client):
        statuses = [(await client.post("/predict", content=text_of(60_000), headers=JSON)).status_code for _ in range(3)]
        copied = service.copied
        shadow.gate.set()
        return statuses, copied

    assert asked(service, ask) == ([200] * 3, len(text_of(60_000)))
    assert counted(service, "fusion_rejections_total", reason="shadow") == 2
    assert (len(shadow.batches), service.copied) == (1, 0)


# The end of the process


def test_a_drain_lasts_as_long_as_a_request_may():
    limits = Limits(read_timeout_s=5.5, timeout_s=100)
    service = service_of(limits=limits)
    server = Server(app_of(service, Control(service, lambda path: pytest.fail("loaded"), 4)), service)
    assert server.config.timeout_graceful_shutdown == math.ceil(5.5 + 100) + 1


def test_the_container_is_given_the_time_of_a_drain():
    service = service_of()
    server = Server(app_of(service, Control(service, lambda path: pytest.fail("loaded"), 4)), service)
    (grace,) = re.findall(r"stop_grace_period: (\d+)s", (HERE.parents[1] / "docker/compose.yaml").read_text())
    assert int(grace) > server.config.timeout_graceful_shutdown + CLOSE_S


HANGING = """
import asyncio

from serving import Parity, service_of

from fusion.deploy.serve import server
from fusion.deploy.serve.app import app_of
from fusion.deploy.serve.control import Control
from fusion.deploy.serve.limits import Limits

server.CLOSE_S = 0.2
model = Parity()
model.gate.clear()
service = service_of(model, limits=Limits(timeout_s={timeout_s}))
bound = server.bound_socket("127.0.0.1", 0)
server.listen(bound)
print(bound.getsockname()[1], flush=True)
one = server.Server(app_of(service, Control(service, None, 4)), service)
asyncio.run(one.serve_until_signal(bound))
"""


@pytest.mark.parametrize(("signals", "timeout_s", "status"), [(1, 0.5, 503), (2, 60, 500)], ids=["one", "two"])
def test_a_model_that_hangs_does_not_keep_the_process(signals, timeout_s, status):
    """A second signal waits for nothing."""
    words = [sys.executable, "-c", HANGING.format(timeout_s=timeout_s)]
    with subprocess.Popen(words, cwd=HERE, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = "127.0.0.1", int(process.stdout.readline())
            with socket.create_connection(address, timeout=30) as connection:
                connection.sendall(A)
                time.sleep(0.2)
                for _ in range(signals):
                    process.send_signal(signal.SIGTERM)
                    time.sleep(0.2)
                assert process.wait(PATIENCE_S / 2) == 0
                assert all_of(connection).startswith(b"HTTP/1.1 %d" % status)
        finally:
            process.kill()
