"""fusion benchmark serve: the load generator counts what the server did, and the table compares like with like."""

import asyncio
import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
from serving import Parity, counted, listening, parity_of, post, service_of
from small_runs import InProcess, Run
from untrained import write_model

from fusion.benchmarks.load import Load, measure
from fusion.benchmarks.processes import free_port
from fusion.benchmarks.serving import cpu_seconds, started
from fusion.benchmarks.serving_samples import Requests, write_requests
from fusion.errors import UserError


def test_the_load_generator_counts_every_answer_once_and_what_is_not_as_expected() -> None:
    service = service_of(Parity())
    texts = ["a", "b", "ab", "c"]
    expected = [f'"answer": "{parity_of(text)}"'.encode() for text in texts]
    wrong = [*expected[:3], b'"answer": "neither"']
    with listening(service) as (host, port):
        requests = [post(json.dumps({"text": text}).encode()) for text in texts]
        right = asyncio.run(measure(f"http://{host}:{port}", Load(requests, expected), 4, 0.5))
        flawed = asyncio.run(measure(f"http://{host}:{port}", Load(requests, wrong), 4, 0.5))
    assert (right.failed, right.first_failure) == (0, "")
    assert right.latencies_ms["p50"] <= right.latencies_ms["p99"] <= right.latencies_ms["max"] < 1000 * right.seconds
    assert abs(flawed.failed - flawed.requests / 3) <= 4
    assert flawed.first_failure.startswith("HTTP/1.1 200")
    answered = counted(service, "fusion_requests_total", status="200", version="main")
    measured = right.requests + flawed.requests + flawed.failed
    assert measured <= answered <= measured + 8  # those in progress at each end are not measured


def test_requests_are_distinct_and_name_the_answers_of_the_model(tmp_path: Path) -> None:
    model = write_model(tmp_path / "run" / "model")
    described = write_requests(Requests(model, 8, 40), {"fusion serve": str(tmp_path / "a"), "LitServe": str(tmp_path / "b")})
    ours, theirs = (json.loads((tmp_path / name).read_text()) for name in "ab")
    assert ours["requests"] == theirs["requests"]
    assert len(set(ours["requests"])) == 512
    assert [one.replace(": ", ":") for one in ours["expected"]] == theirs["expected"]
    assert len(set(ours["expected"])) > 1
    assert re.fullmatch(r"512 distinct requests, with JPEG pictures, of \d\.\d kB each", described)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--run is missing; expected a run or a package"),
        (["--run=x", "--seconds=0"], "--seconds is 0; expected at least 1"),
        (["--run=x", "--against=apache"], "--against apache: expected litserve"),
        (["--run=x", "--speed=1"], "unknown option --speed=1"),
    ],
)
def test_mistakes_are_one_line(in_process: InProcess, arguments: list[str], message: str) -> None:
    status, told = in_process("benchmark", ["serve", *arguments])
    assert (status, message in told, told.count("\n")) == (2, True, 1), told


@pytest.mark.slow
def test_a_server_that_cannot_start_is_reported(tmp_path: Path) -> None:
    port = free_port()
    with (
        pytest.raises(UserError, match="the server didn't start: error: there is no run or package"),
        started(["-m", "fusion", "serve", "x"], port),
    ):
        pass


@pytest.mark.slow
def test_the_table_compares_the_servers_with_the_model_alone(here: Run, tmp_path: Path) -> None:
    model = write_model(tmp_path / "run" / "model")
    before = cpu_seconds(os.getpid())
    done = here(
        "benchmark", "serve", f"--run={model}", "--against=litserve", "--seconds=2", "--rounds=1", "--connections=8", "--batch_size=4"
    )
    assert done.returncode == 0, done.stderr
    rows = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    assert re.search(r"fusion serve +[\d,]+ +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +0$", rows["fusion serve"])
    assert re.search(r"at once, \d+ threads? each +[\d,]+ +[\d.]+$", done.stdout, re.MULTILINE)
    if importlib.util.find_spec("litserve"):
        assert re.search(r"LitServe +[\d,]+ .* 0$", rows["LitServe"])
    else:
        assert "pip install litserve" in done.stdout
    assert cpu_seconds(os.getpid()) >= before
