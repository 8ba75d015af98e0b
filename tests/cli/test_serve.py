"""fusion serve: the process and its signals; mistakes in one line."""

import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from small_runs import ROOT, InProcess, Run
from untrained import write_model


@contextlib.contextmanager
def served(*arguments: str | Path, token: str | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server on a free port: the process and its URL."""
    words = [sys.executable, str(ROOT / "scripts/serve.py"), *map(str, arguments), "--port=0"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | ({"FUSION_CONTROL_TOKEN": token} if token else {})
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            found = re.search(r" at (http://[\d.]+:\d+):", first)
            assert found, first + process.stdout.read()
            yield process, found[1]
        finally:
            if process.poll() is None:
                process.kill()


def ask(url: str, body: object) -> dict[str, object]:
    sent = Request(f"{url}/predict", json.dumps(body).encode(), {"content-type": "application/json"})
    with urlopen(sent, timeout=60) as answer:
        found: dict[str, object] = json.load(answer)
        return found


def metric(url: str, name: str) -> float:
    with urlopen(f"{url}/metrics", timeout=60) as answer:
        (value,) = re.findall(rf"^{name} (\S+)$", answer.read().decode(), flags=re.MULTILINE)
        return float(value)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("served") / "run" / "model")


# Mistakes


def test_a_port_in_use_is_reported_before_the_model_is_loaded(in_process: InProcess) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        status, told = in_process("serve", ["no such run", f"--port={port}"])
    assert (status, told) == (2, f"error: port {port} of 127.0.0.1 is in use; choose another one: --port={port + 1}, or 0 for any\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--port=0"], "there is no run or package nowhere"),
        (["/"], "has no checkpoint 'best'"),
        ([], "expected one run or package, got none"),
        (["--run=nowhere", "--port=0"], "there is no run or package nowhere"),
        (["a", "--run", "b"], "expected one run or package, got a and b"),
        (["--port=0", "--url_host", "example.com", "nowhere"], "there is no run or package nowhere"),
        (["a", "--device=gpu"], "argument --device: invalid choice: 'gpu'"),
        (["a", "--parallel_batches=x"], "argument --parallel_batches: x; expected an integer of at least 1"),
        (["a", "b"], "expected one run or package, got a and b"),
        (["a", "--canary", "b=60%", "--canary", "c=50%"], "the canaries get 60 % + 50 % = 110 % of the requests; expected at most 100 %"),
        (["a", "--canary", "b"], "canary 'b': expected PATH=SHARE%, above 0 and at most 100 %, as packages/new=5%"),
        (["a", "--port=70000"], "--port is 70000; expected a number up to 65535, 0 for any"),
        (["a", "--host=256.1.1.1"], "can't listen on port 8000 of 256.1.1.1"),
        (["a", "--max_queue=0"], "--max_queue is 0; expected a number above 0"),
        (["a", "--wait_ms=-1"], "--wait_ms is -1; expected 0 or more"),
        (["a", "--max_errors=2"], "--max_errors is 2.0; expected a share between 0 and 1"),
        (["a", "--batch_size=0"], "argument --batch_size: 0; expected an integer of at least 1"),
        (["a", "--prot=1"], "unknown option --prot. Did you mean port?"),
        (["--control", "http://127.0.0.1:1", "status"], "status: no server answers at http://127.0.0.1:1"),
        (["--control", "nonsense", "status"], "status: no server answers at nonsense"),
        (["--control", "http://127.0.0.1:1", "promot"], "unknown command 'promot'. Did you mean promote?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(in_process: InProcess, arguments: list[str], message: str) -> None:
    status, told = in_process("serve", arguments)
    assert (status, message in told, told.count("\n")) == (2, True, 1), told


def test_the_help_describes_every_option(here: Run) -> None:
    told = " ".join(here("serve", "--help").stdout.split())
    for text in (
        "--canary PATH=SHARE another version for a share of the requests, as new=5%",
        "--max_latency_ms MAX_LATENCY_MS a canary is rolled",
    ):
        assert text in told


# The process


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_answers_what_was_admitted_and_ends_with_0(model: Path, number: signal.Signals) -> None:
    with served(model, "--wait_ms=1500") as (process, url):
        answers: list[object] = []
        waiting = [threading.Thread(target=lambda: answers.append(ask(url, {"text": "a red circle"})["answer"])) for _ in range(5)]
        for thread in waiting:
            thread.start()
        while metric(url, "fusion_queue_depth") < 5:
            time.sleep(0.02)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        for thread in waiting:
            thread.join()
    assert process.returncode == 0, output
    assert len(answers) == 5
    assert f"{number.name}: answering 5 requests in progress" in output


@pytest.mark.slow
def test_a_server_is_controlled_by_commands(model: Path, here: Run, tmp_path: Path) -> None:
    newer = write_model(tmp_path / "newer" / "model", seed=1)
    with served(model, "--canary", f"{newer}=50%", "--shadow", write_model(tmp_path / "shadow" / "model", seed=2)) as (process, url):
        status = json.loads(here("serve", "--control", url, "status").stdout)
        assert [one["role"] for one in status["versions"]] == ["main", "canary", "shadow"]
        assert {ask(url, {"text": "a red circle"})["version"] for _ in range(40)} == {one["version"] for one in status["versions"][:2]}
        promoted = json.loads(here("serve", "--control", url, "promote", status["versions"][1]["version"]).stdout)
        assert promoted["versions"][0]["version"] == status["versions"][1]["version"]
        refused = here("serve", "--control", url, "canary", f"{newer}=10%")
        assert (refused.returncode, "which is already served" in refused.stderr) == (2, True)
        assert here("serve", "--control", url, "rollback").returncode == 0
        assert here("serve", "--control", url, "rollback").returncode == 0
        assert ask(url, {"text": "a red circle"})["version"] == status["versions"][0]["version"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.slow
def test_a_server_with_a_token_takes_commands_from_nobody_else(model: Path, here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(model, token="secret") as (_, url):
        refused = here("serve", "--control", url, "status")
        assert (refused.returncode, refused.stderr) == (2, "error: status: the token is missing or wrong\n")
        monkeypatch.setenv("FUSION_CONTROL_TOKEN", "secret")
        assert here("serve", "--control", url, "status").returncode == 0


@pytest.mark.slow
def test_a_trained_run_answers_as_predict_does(trained: Path, command: Run, world: Path) -> None:
    images = sorted((world / "cache").rglob("images/*.png"))[:20]
    (world / "asked.csv").write_text("image,text\n" + "".join(f"{image},is there a red circle?\n" for image in images))
    assert command("predict", "--run", str(trained), "--manifest", "asked.csv", "--out", "served.csv").returncode == 0
    predicted = [line.split(",")[1] for line in (world / "served.csv").read_text().replace('"', "").splitlines()[1:]]
    with served(trained) as (_, url):
        sent = [{"image": base64.b64encode(image.read_bytes()).decode(), "text": "is there a red circle?"} for image in images]
        assert [ask(url, body)["answer"] for body in sent] == predicted
