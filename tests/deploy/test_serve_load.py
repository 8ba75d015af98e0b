"""Distinct requests under load and faults, to a server process: none is lost, none gets another's answer, each as offline."""

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest
from serving import encoded, listening, post
from test_serve_requests import BOMB
from test_serve_runs import bodies, samples, service_of_path
from untrained import write_model

import fusion
from fusion.deploy.serve.canary import RollbackLimits
from fusion.deploy.serve.control import send_command
from fusion.deploy.serve.limits import Limits
from fusion.deploy.serve.model import load

ROOT = Path(__file__).parents[2]
SECONDS = 240


@contextlib.contextmanager
def server(*arguments, timeout_s=SECONDS):
    """A server in a process of its own: the process and its URL."""
    words = [sys.executable, str(ROOT / "scripts/serve.py"), *map(str, arguments), "--port=0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        first = process.stdout.readline()
        found = re.search(r"at (http://\S+):(\d+):", first)
        assert found, first + process.stdout.read()
        yield process, f"{found[1]}:{found[2]}"
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(timeout_s)
        process.stdout.close()


def fault(address, kind):
    """A client that does harm: leaves, stalls, sends bombs and nonsense."""
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=5) as connection:
        if kind == 0:  # leaves while its request waits
            connection.sendall(post(b'{"text": "a red circle"}'))
        elif kind == 1:  # leaves amid its body
            connection.sendall(post(b'{"text": "a red circle"}')[:-3])
        elif kind == 2:
            connection.sendall(post(json.dumps({"image": encoded(BOMB)}).encode()))
            connection.recv(1000)
        elif kind == 3:
            connection.sendall(post(b'{"text": NaN}'))
            connection.recv(1000)
        else:
            connection.sendall(b"\x00\xff nonsense\r\n\r\n")
            connection.recv(1000)


class Stages:
    """Requests in five parts, between which commands are sent: of each part, every other request waits for its command to be done, so that
    some come while it is being done, and some surely after it. A command waits for the answers of all parts before the last one."""

    def __init__(self, count):
        self.count, self.done = count, 0
        self.answers, self.shed = {}, 0
        self.left = Counter(map(self.stage, range(count)))  # to be answered, by part

    def stage(self, i):
        return 5 * i // self.count

    async def request(self, http, url, i, id, body):
        while i % 2 and self.done < self.stage(i):
            await asyncio.sleep(0.002)
        while True:
            answer = await http.post(f"{url}/predict", json=body, headers={"x-request-id": id})
            if answer.status_code != 503:
                break
            self.shed += 1
            assert int(answer.headers["retry-after"]) >= 1
            await asyncio.sleep(0.02)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-request-id"] == answer.json()["id"] == id
        assert id not in self.answers
        self.answers[id] = answer.json()
        self.left[self.stage(i)] -= 1

    async def all(self, url, sent, commands):
        """Sends all requests, by 32 clients, with commands and faults in the meantime."""
        pending = iter(enumerate(sent.items()))

        async def client():
            async with httpx.AsyncClient(timeout=60) as http:
                for i, (id, body) in pending:
                    await self.request(http, url, i, id, body)

        await asyncio.gather(asyncio.to_thread(self.harm, url, commands), *(client() for _ in range(32)))

    def harm(self, url, commands):
        host, _, port = url.removeprefix("http://").partition(":")
        end = time.monotonic() + SECONDS
        for number in itertools.count():
            assert time.monotonic() < end
            if len(self.answers) == self.count:
                return
            fault((host, int(port)), number % 5)
            earlier = sum(self.left[stage] for stage in range(self.done))
            if self.done < len(commands) and not earlier and len(self.answers) > self.count * (self.done + 1) // 5 - 16:
                for command in commands[self.done]:
                    send_command(url, command)
                self.done += 1
            time.sleep(0.005)


def asked_here(paths, stages, sent, commands):
    """By a server in this process."""
    service = service_of_path(paths["main"], limits=Limits(max_queue=8), rollback=RollbackLimits(max_disagreement=1, max_latency_ms=60_000))
    with listening(service, partial(load, threads=1, max_megapixels=25.0)) as (host, port):
        asyncio.run(stages.all(f"http://{host}:{port}", sent, commands))
    assert (service.depth, service.copies, service.memory) == (0, 0, 0)


def asked_of_a_process(paths, stages, sent, commands):
    limits = ["--max_queue=24", "--batch_size=8", "--max_disagreement=1", "--max_latency_ms=60000"]
    with server(paths["main"], *limits) as (process, url):
        asyncio.run(stages.all(url, sent, commands))
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert (process.returncode, "Traceback" in output) == (0, False), output


@pytest.mark.parametrize(
    ("count", "ask"),
    [(150, asked_here), pytest.param(10_000, asked_of_a_process, marks=[pytest.mark.slow, pytest.mark.timeout(900)])],
    ids=["150", "10000"],
)
def test_distinct_requests_under_load_and_faults_are_answered_as_offline(count, ask, tmp_path):
    paths = {name: write_model(tmp_path / name / "model", seed=seed, table=True) for name, seed in (("main", 0), ("new", 1), ("newer", 2))}
    images, written, facts = samples(count)
    sent = dict(zip((f"request-{i}" for i in range(count)), bodies(images, written, facts), strict=True))
    stages = Stages(count)
    # More requests than the queue takes, so that some are shed and tried again.
    commands = [
        [["canary", f"{paths['new']}=30%"]],
        [["shadow", str(paths["newer"])]],
        [["promote", load(paths["new"], threads=1, max_megapixels=1.0).version]],
        [["rollback"], ["reload", str(paths["newer"])]],  # of the shadow
    ]
    ask(paths, stages, sent, commands)
    assert stages.answers.keys() == sent.keys()
    columns = {name: [row and row[name] for row in facts] for name in ("price", "brand")}
    expected = {name: fusion.load(path).predict(images=images, texts=written, facts=columns) for name, path in paths.items()}
    versions = []
    for i, answer in enumerate(stages.answers[id] for id in sent):
        versions.append(answer["version"].rsplit("-", 1)[0])
        right = expected[versions[-1]]
        found = np.array(list(answer["probabilities"].values()))
        assert np.abs(found - right.values[i]).max() < 1e-5, f"request-{i}"
        assert answer["answer"] == right.names[int(found.argmax())]
        assert answer["present"] == {name: bool(mask[i]) for name, mask in right.present.items()}
    # A swap would be seen, the commands had their effect, and there was overload.
    assert len({tuple(answer["probabilities"].values()) for answer in stages.answers.values()}) > 0.9 * count
    assert set(versions[1 : count // 5 : 2]) <= {"main", "new"}
    assert set(versions[count // 5 + 1 : 2 * count // 5 : 2]) == {"main", "new"}
    assert set(versions[-count // 5 + 1 :: 2]) == {"newer"}
    assert stages.shed > 0
