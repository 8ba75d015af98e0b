"""The server at its sockets: slow clients, clients that leave, overload, draining, health, metrics, control."""

import contextlib
import http.server
import re
import socket
import threading
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import (
    Parity,
    answer_on,
    asked,
    counted,
    encoded,
    exchange,
    listening,
    parity_of,
    picture,
    png,
    post,
    service_of,
    version_of,
)

from fusion.deploy.serve.control import Control, send_command
from fusion.deploy.serve.fetching import Fetcher
from fusion.deploy.serve.limits import Limits, Rejected, overloaded
from fusion.deploy.serve.requests import Url
from fusion.errors import UserError

A = post(b'{"text": "a"}')


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


# Clients


@pytest.mark.parametrize("part", [b"POST /predict HT", A[:-5]], ids=["head", "body"])
def test_a_slow_client_is_answered_408_and_costs_no_other_request(part):
    service = service_of(limits=Limits(read_timeout_s=0.3))
    with listening(service) as address, contextlib.ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(20)]
        for one in slow:
            one.sendall(part)
        assert exchange(address, A)[0] == 200
        for one in slow:
            status, headers, _ = answer_on(one)
            assert (status, headers["connection"], one.recv(1)) == (408, "close", b"")
        assert counted(service, "fusion_rejections_total", reason="slow") == 20
        wait_for(lambda: service.connections == 0)
        assert service.memory == 0


def test_a_client_that_leaves_costs_no_batch():
    """Two requests wait behind a held one; the one whose client has left is never run."""
    model = Parity()
    service = service_of(model, batch_size=1, threads=1)
    with listening(service) as address:
        model.gate.clear()
        held = socket.create_connection(address, timeout=30)
        held.sendall(A)
        model.wait_for_batch()
        leaving, staying = (socket.create_connection(address, timeout=30) for _ in range(2))
        leaving.sendall(post(b'{"text": "gone"}'))
        wait_for(lambda: service.depth == 2)
        staying.sendall(post(b'{"text": "here"}'))
        wait_for(lambda: service.depth == 3)
        leaving.close()
        wait_for(lambda: service.depth == 2)
        model.gate.set()
        assert [answer_on(one)[2]["answer"] for one in (held, staying)] == [parity_of("a"), parity_of("here")]
        assert model.batches == [["a"], ["here"]]
        wait_for(lambda: counted(service, "fusion_requests_total", status="499", version="main") == 1)
        held.close(), staying.close()


def test_a_client_that_leaves_amid_its_body_frees_its_memory():
    service = service_of()
    with listening(service) as address:
        with socket.create_connection(address, timeout=30) as leaving:
            leaving.sendall(post(b'{"text": "%s' % (b"a" * 1_000_000))[:900_000])
            wait_for(lambda: service.memory > 500_000)
        wait_for(lambda: service.memory == 0)
        assert exchange(address, A)[0] == 200


def test_a_connection_is_kept_and_may_send_ahead():
    with listening(service_of()) as address, socket.create_connection(address, timeout=30) as connection:
        connection.sendall(post(b'{"text": "a"}') + post(b'{"text": 1}') + post(b'{"text": "b"}'))
        received = b""
        while received.count(b"HTTP/1.1") < 3 or not received.endswith(b"}"):
            received += connection.recv(65536)
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"200", b"422", b"200"]
    assert [one.decode() for one in re.findall(rb'"answer": "(\w+)"', received)] == [parity_of("a"), parity_of("b")]


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nx: " + b"a" * 300_000, 431),
        (post(b"", "transfer-encoding: nonsense").replace(b"content-length: 0\r\n", b""), 400),
        (b"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: -1\r\n\r\n", 400),
    ],
)
def test_malformed_http_is_answered_4xx_and_costs_no_other_request(sent, status):
    with listening(service_of()) as address, socket.create_connection(address, timeout=30) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(sent)
        received = b""
        with contextlib.suppress(ConnectionError):
            while chunk := connection.recv(65536):
                received += chunk
        assert received.startswith(f"HTTP/1.1 {status}".encode())
        assert exchange(address, A)[0] == 200


def test_a_body_that_is_too_large_is_answered_though_the_client_sends_it_all():
    service = service_of(limits=Limits(max_body_mb=0.1))
    with listening(service) as address:
        status, headers, body = exchange(address, post(b'{"text": "%s"}' % (b"a" * 700_000)))
        assert (status, body["error"]) == (413, "the body is too large, limit 0.1 MB")
        assert "connection" not in headers  # all of it was read
        endless = post(b"", "expect: 100-continue").replace(b"content-length: 0", b"content-length: 99999999999")
        status, headers, _ = exchange(address, endless)
        assert (status, headers["connection"]) == (413, "close")
        assert exchange(address, A)[0] == 200


# Overload


def test_overload_is_shed_with_503_and_a_time_to_try_again():
    model = Parity()
    service = service_of(model, limits=Limits(max_queue=5))
    with listening(service) as address, contextlib.ExitStack() as stack:
        model.gate.clear()
        admitted = [stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(5)]
        for one in admitted:
            one.sendall(A)
        wait_for(lambda: service.depth == 5)
        for _ in range(10):
            status, headers, body = exchange(address, A)
            assert (status, body["error"]) == (503, "too many requests are in progress")
            assert 1 <= int(headers["retry-after"]) <= 30
        assert counted(service, "fusion_queue_depth") == 5
        model.gate.set()
        assert {answer_on(one)[0] for one in admitted} == {200}
        assert counted(service, "fusion_rejections_total", reason="queue") == 10
        assert exchange(address, A)[0] == 200


def test_large_bodies_in_progress_are_shed_by_memory():
    model = Parity()
    service = service_of(model, limits=Limits(max_memory_mb=0.05, max_text=100_000))
    with listening(service) as address, socket.create_connection(address, timeout=30) as large:
        model.gate.clear()
        large.sendall(post(b'{"text": "%s"}' % (b"a" * 49_995)))  # with 12 bytes more of JSON, 7 beyond the limit
        model.wait_for_batch()
        assert exchange(address, A)[0] == 503
        model.gate.set()
        assert answer_on(large)[0] == 200
        wait_for(lambda: service.memory == 0)
        assert exchange(address, A)[0] == 200
        assert counted(service, "fusion_rejections_total", reason="memory") == 1


def test_a_request_that_waits_too_long_is_answered_503():
    model = Parity()
    service = service_of(model, limits=Limits(timeout_s=0.2))
    model.gate.clear()
    with listening(service) as address:
        status, headers, body = exchange(address, A)
        assert (status, body["error"], "retry-after" in headers) == (503, "the answer took longer than 0.2 s", True)
        wait_for(lambda: service.depth == 0)
        model.gate.set()


def test_connections_beyond_the_limit_are_answered_503():
    service = service_of(limits=Limits(max_connections=3))
    with listening(service) as address, contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(3)]
        for one in held:
            one.sendall(A)
            assert answer_on(one)[0] == 200
        status, headers, _ = exchange(address, b"")
        assert (status, headers["retry-after"]) == (503, "1")
        held[0].close()
        wait_for(lambda: service.connections == 2)
        assert exchange(address, A)[0] == 200


def test_the_time_to_try_again_is_that_of_the_queue():
    assert [overloaded("queue", "", 500, rate).retry_after_s for rate in (0.0, 100.0, 5000.0, 1.0)] == [1, 5, 1, 30]


# A failing model


def test_a_sample_for_which_the_model_fails_costs_only_its_own_request():
    model = Parity(fails=["b"])
    service = service_of(model, batch_size=4, wait_ms=60_000)

    async def ask(client):
        import asyncio

        return await asyncio.gather(*(client.post("/predict", json={"text": text}) for text in "abcd"))

    answers = asked(service, ask)
    assert [answer.status_code for answer in answers] == [200, 500, 200, 200]
    assert [answers[i].json()["answer"] for i in (0, 2, 3)] == [parity_of(text) for text in "acd"]
    assert answers[1].json()["error"] == "the model failed for this sample"
    assert sorted(model.batches[0]) == ["a", "b", "c", "d"]
    assert counted(service, "fusion_failures_total", version="main") == 1


def test_an_answer_that_is_not_finite_is_a_failure():
    answer = asked(service_of(Parity(nan=True)), lambda client: client.post("/predict", json={"text": "a"}))
    assert (answer.status_code, answer.json()["error"]) == (500, "the model's output for this sample is not finite")


# Health, metrics, documentation


def test_a_drain_answers_what_was_admitted_and_takes_nothing_more():
    model = Parity()
    service = service_of(model, batch_size=1, threads=1)
    with listening(service) as address:
        model.gate.clear()
        waiting = [socket.create_connection(address, timeout=30) for _ in range(3)]
        for one in waiting:
            one.sendall(A)
        wait_for(lambda: service.depth == 3)
        threading.Timer(0.2, model.gate.set).start()
    # The server has ended.
    assert [answer_on(one)[0] for one in waiting] == [200] * 3
    with pytest.raises(ConnectionError):
        socket.create_connection(address, timeout=5)
    for one in waiting:
        one.close()


def test_health_is_that_of_the_threads_and_readiness_ends_with_a_drain():
    service = service_of()

    async def ask(client):
        paths = ("/healthz", "/readyz")
        healthy = [(await client.get(path)).status_code for path in paths]
        service.draining = True
        draining = [(await client.get(path)).status_code for path in paths]
        service.pool.close()
        ended = [(await client.get(path)).status_code for path in paths]
        return healthy, draining, ended

    assert asked(service, ask) == ([200, 200], [200, 503], [500, 503])


def test_the_metrics_are_read_by_prometheus_and_count_what_happened():
    service = service_of()
    service.versions.add_canary(version_of(Parity(), "new"), 0.25)
    service.show_shares()

    async def ask(client):
        for i in range(8):
            await client.post("/predict", json={"text": f"text {i}"})
        await client.post("/predict", json={"text": 1})
        return await client.get("/metrics")

    families = {one.name: one for one in text_string_to_metric_families(asked(service, ask).text)}
    by_status = {sample.labels["status"]: 0.0 for sample in families["fusion_requests"].samples}
    for sample in families["fusion_requests"].samples:
        by_status[sample.labels["status"]] += sample.value
    assert by_status == {"200": 8, "422": 1}
    samples = {(sample.name, *sample.labels.values()): sample.value for one in families.values() for sample in one.samples}
    assert samples["fusion_request_seconds_count",] == 9
    assert samples["fusion_rejections_total", "invalid"] == 1
    assert samples["fusion_missing_inputs_total", "image"] == 8
    assert (samples["fusion_confidence_count",], samples["fusion_confidence_sum",]) == (8, 6.0)
    answers = [parity_of(f"text {i}") for i in range(8)]
    assert {name: samples["fusion_answers_total", name] for name in set(answers)} == {name: answers.count(name) for name in set(answers)}
    assert samples["fusion_version_share", "main", "main"] == 0.75
    assert samples["fusion_batch_size_sum",] >= 8
    assert "fusion_queue_depth" in families


def test_the_interface_is_described_without_anything_from_elsewhere():
    async def ask(client):
        return (await client.get("/openapi.json")).json(), (await client.get("/docs")).text

    schema, page = asked(service_of(), ask)
    body = schema["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert (
        list(body["application/json"]["schema"]["properties"])
        == list(body["multipart/form-data"]["schema"]["properties"])
        == ["image", "text"]
    )
    assert {"200", "400", "408", "413", "415", "422", "500", "503"} == set(schema["paths"]["/predict"]["post"]["responses"])
    assert not re.findall(r"(?:src|href)=.?(?:https?:)?//|<script|@import", page)
    assert "POST /predict" in page


# Control


@pytest.mark.parametrize(
    ("headers", "token", "status"),
    [
        ({"x-fusion-control": "1"}, None, 200),
        ({}, None, 403),
        ({"x-fusion-control": "1", "x-forwarded-for": "10.0.0.1"}, None, 403),
        ({"x-fusion-control": "1", "host": "evil.example"}, None, 403),
        ({"host": "public.example"}, "", 403),
        ({"x-fusion-control": "1"}, "secret", 403),
        ({"authorization": "Bearer wrong"}, "secret", 403),
        ({"authorization": "Bearer secret", "x-forwarded-for": "10.0.0.1"}, "secret", 200),
    ],
)
def test_commands_are_taken_from_this_machine_or_with_the_token(headers, token, status):
    import asyncio

    import httpx

    from fusion.deploy.serve.app import app_of

    service = service_of()
    transport = httpx.ASGITransport(app_of(service, Control(service, lambda path: pytest.fail("loaded"), 4, token)))

    async def ask():
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
            return [await client.get("/control/status", headers=headers), await client.post("/control/rollback", headers=headers)]

    answers = asyncio.run(ask())
    assert [answer.status_code for answer in answers] == [status, 409 if status == 200 else 403]


def test_the_control_command_prints_the_versions_and_reports_refusals():
    service = service_of()
    with listening(service) as (host, port):
        url = f"http://{host}:{port}"
        assert send_command(url, ["canary", "new=5%"])["versions"][1]["share"] == 0.05
        assert send_command(url, ["promote"])["versions"][0]["version"] == "new"
        assert send_command(url, ["status"])["versions"][1]["role"] == "previous"
        send_command(url, ["canary", "b=60%"])
        with pytest.raises(UserError, match=r"the canaries get 60 % \+ 50 % = 110 %"):
            send_command(url, ["canary", "c=50%"])
        with pytest.raises(UserError, match=r"unknown command 'promot'\. Did you mean promote"):
            send_command(url, ["promot"])
    with pytest.raises(UserError, match=f"status: no server answers at {url}"):
        send_command(url, ["status"])


# URLs


class Pictures(http.server.BaseHTTPRequestHandler):
    """A host of pictures. hold: while it is not set, one path doesn't answer."""

    hold = threading.Event()

    def do_GET(self):
        if self.path == "/held.png":
            self.hold.wait(30)
        if self.path == "/elsewhere.png":
            self.send_response(302)
            self.send_header("location", "/a.png")
            self.end_headers()
            return
        content = b"x" * 200_000 if self.path == "/large.png" else png(picture(1))
        self.send_response(404 if self.path == "/none.png" else 200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def host():
    """A host of pictures, as host:port."""
    Pictures.hold.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        Pictures.hold.set()
        server.shutdown()


def test_an_image_by_url_is_fetched_from_an_allowed_host_alone(host):
    async def ask(client):
        urls = [f"http://{host}/a.png", "http://example.org/a.png", "file:///etc/passwd", "http://[/a.png"]
        return [await client.post("/predict", json={"text": "a", "image": url}) for url in urls]

    allowed = asked(service_of(url_hosts=[host]), ask)
    assert [answer.status_code for answer in allowed] == [200, 422, 422, 422]
    assert allowed[0].json()["answer"] == parity_of("a", picture(1))
    assert allowed[1].json()["error"] == f"images are fetched only of {host}; send the image in base64"
    refused = asked(service_of(), ask)
    assert refused[0].json()["error"] == "images are not fetched by this server; send the image in base64"


@pytest.mark.parametrize(
    ("path", "message"),
    [("none", "answered 404"), ("elsewhere", "answered 302"), ("large", "more than 0.1 MB"), ("held", "can't be fetched")],
)
def test_what_cannot_be_fetched_is_a_422(host, path, message):
    service = service_of(url_hosts=[host], limits=Limits(max_body_mb=0.1, read_timeout_s=0.3))
    answer = asked(service, lambda client: client.post("/predict", json={"image": f"http://{host}/{path}.png"}))
    assert (answer.status_code, message in answer.json()["error"]) == (422, True), answer.text


def test_a_slow_host_delays_no_other_request(host):
    service = service_of(url_hosts=[host], threads=1)

    async def ask(client):
        import asyncio

        slow = [asyncio.create_task(client.post("/predict", json={"image": f"http://{host}/held.png"})) for _ in range(5)]
        others = [await client.post("/predict", json={"text": f"text {i}", "image": encoded(png(picture(i)))}) for i in range(5)]
        waited = [task.done() for task in slow]
        Pictures.hold.set()
        return others, waited, await asyncio.gather(*slow)

    others, waited, slow = asked(service, ask)
    assert [answer.json()["answer"] for answer in others] == [parity_of(f"text {i}", picture(i)) for i in range(5)]
    assert not any(waited)
    assert {answer.json()["answer"] for answer in slow} == {parity_of(None, picture(1))}


def test_no_more_images_are_fetched_at_once_than_there_is_room_for(host):
    fetcher, done = Fetcher([host], Limits()), threading.Semaphore(0)
    held = {"image": Url(f"http://{host}/held.png")}
    assert all(fetcher.start(held, lambda _: done.release()) for _ in range(64))
    with pytest.raises(Rejected, match="too many images are being fetched") as rejected:
        fetcher.start(held, lambda _: done.release())
    Pictures.hold.set()
    assert (rejected.value.status, rejected.value.retry_after_s) == (503, 1)
    for _ in range(64):
        assert done.acquire(timeout=30)
    assert fetcher.start({"image": Url(f"http://{host}/a.png")}, lambda _: done.release())
    assert done.acquire(timeout=30)
    fetcher.close()
