"""fusion benchmark serve: requests per second of `fusion serve` and of LitServe, beside the model's own batched throughput.

Everything runs on the same cores, the load generator included, in turns.
"""

import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from fusion.benchmarks.load import Measured
from fusion.benchmarks.processes import free_port, in_new_process
from fusion.benchmarks.serving_samples import ModelRate, Requests, model_rate, write_requests
from fusion.console import aligned, print_rank_zero
from fusion.errors import UserError

DISTINCT = 512  # requests, sent in turns
WARM_UP_S = 2.0
START_S = 120.0  # in which a server must be ready
WORDS = ("is", "there", "a", "red", "green", "blue", "circle", "square", "above", "below", "the", "what", "colour", "shape", "next", "to")
OURS, THEIRS = "fusion serve", "LitServe"


class Setting(NamedTuple):
    """What is measured, and how. path: the model. connections: each has one request in progress."""

    path: Path
    seconds: float
    rounds: int
    connections: int
    batch_size: int
    pixels: int | None
    runs: int
    threads: int


class Sample(NamedTuple):
    """One server's figures in one round. cpu_ms: of the server, and of the load generator, for each request."""

    load: Measured
    cpu_ms: float

    @property
    def load_cpu_ms(self) -> float:
        return 1000 * self.load.cpu_s / max(self.load.requests, 1)


def benchmark_serving(setting: Setting, against: str | None) -> int:
    """Print a table of the servers. against: "litserve", or None."""
    if against not in (None, "litserve"):
        raise UserError(f"--against {against}: expected litserve")
    servers: dict[str, Callable[[Setting, int], list[str]]] = {OURS: our_command}
    if against and importlib.util.find_spec("litserve") is None:
        print_rank_zero("LitServe is left out, since it is not installed: pip install litserve")
    elif against:
        servers[THEIRS] = their_command
    with tempfile.TemporaryDirectory() as folder:
        wanted = Requests(setting.path, setting.batch_size, setting.pixels)
        described = in_new_process(write_requests, wanted, {name: str(requests_of(folder, name)) for name in servers})
        samples: dict[str, list[Sample]] = {name: [] for name in servers}
        alone: dict[str, list[ModelRate]] = {}
        for i in range(setting.rounds):
            for name, command in servers.items():
                samples[name].append(measure(command, setting, requests_of(folder, name)))
                shown = samples[name][-1]
                print_rank_zero(f"round {i + 1} of {setting.rounds}: {name} {shown.load.per_second:,.0f} requests/s")
            for runs, threads in sorted({(setting.runs, setting.threads), (1, setting.runs * setting.threads)}):
                own = in_new_process(model_rate, wanted, runs, threads, max(setting.seconds / 4, 3.0))
                name = f"model alone, {runs} batch{'es' if runs > 1 else ''} at once, {threads} thread{'s' if threads > 1 else ''} each"
                alone.setdefault(name, []).append(own)
    print_table(setting, described, samples, alone)
    return 0


def print_table(
    setting: Setting, described: str, samples: Mapping[str, Sequence[Sample]], alone: Mapping[str, Sequence[ModelRate]]
) -> None:
    """Medians over the rounds, with the lowest and highest rate."""
    best = max(alone.values(), key=lambda rates: statistics.median(own.per_second for own in rates))
    lines = [["", "requests/s", "p50 ms", "p99 ms", "CPU ms a request", "+ of the load", "of the model's own", "failed"]]
    for name, each in samples.items():
        ratios = [one.load.per_second / own.per_second for one, own in zip(each, best, strict=True)]
        entries = [spread([one.load.per_second for one in each], ",.0f")]
        entries += [f"{statistics.median(one.load.latencies_ms[place] for one in each):.1f}" for place in ("p50", "p99")]
        entries += [f"{statistics.median(one.cpu_ms for one in each):.2f}", f"{statistics.median(one.load_cpu_ms for one in each):.3f}"]
        lines.append([name, *entries, spread(ratios, ".2f"), f"{sum(one.load.failed for one in each):,}"])
    for name, rates in alone.items():
        cpu = statistics.median(own.cpu_ms for own in rates)
        lines.append([name, spread([own.per_second for own in rates], ",.0f"), "", "", f"{cpu:.2f}"])
    for name, each in samples.items():
        for one in each:
            if one.load.first_failure:
                print_rank_zero(f"{name}: {one.load.first_failure.splitlines()[0]}")
    print(
        f"{setting.path}: {described}; batches of up to {setting.batch_size}; {setting.connections} connections, {setting.seconds:g} s, "
        f"median of {setting.rounds} rounds (lowest to highest)\n\n{aligned(lines)}"
    )


def spread(values: Sequence[float], form: str) -> str:
    """
    >>> spread([0.5, 1.25, 1.0], ".2f"), spread([1234.5], ",.0f")
    ('1.00 (0.50 to 1.25)', '1,234')
    """
    middle = f"{statistics.median(values):{form}}"
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}} to {max(values):{form}})"


# Servers


def requests_of(folder: str, server: str) -> Path:
    """The file of a server's requests."""
    return Path(folder) / f"{server.replace(' ', '-')}.json"


def our_command(setting: Setting, port: int) -> list[str]:
    options = {"port": port, "batch_size": setting.batch_size, "parallel_batches": setting.runs, "threads": setting.threads}
    options |= {"max_queue": 2 * setting.connections, "timeout_s": 600}
    return ["-m", "fusion", "serve", str(setting.path), *(f"--{name}={value}" for name, value in options.items())]


def their_command(setting: Setting, port: int) -> list[str]:
    return [
        "-m",
        "fusion.benchmarks.litserve_server",
        json.dumps([str(setting.path), port, setting.batch_size, setting.runs, setting.threads]),
    ]


@contextmanager
def started(command: list[str], port: int) -> Iterator[subprocess.Popen[str]]:
    """A server in a process of its own, once it answers. Raises UserError for one that doesn't."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, *command], env=environment, stdout=output, stderr=output, text=True, start_new_session=True
        )
        try:
            end, opener = time.monotonic() + START_S, build_opener(ProxyHandler({}))
            while not answers(opener, port):
                if process.poll() is not None or time.monotonic() > end:
                    output.seek(0)
                    raise UserError(f"the server didn't start: {' '.join(output.read().split())[-500:]}")
                time.sleep(0.1)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with suppress(ProcessLookupError):  # what it has left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(opener: Any, port: int) -> bool:
    """Whether a server is ready, asked as fusion serve and as LitServe are asked."""
    for path in ("readyz", "health"):
        try:
            with opener.open(f"http://127.0.0.1:{port}/{path}", timeout=5) as answer:
                return bool(answer.status == 200)
        except (URLError, OSError):
            continue
    return False


def measure(command: Callable[[Setting, int], list[str]], setting: Setting, requests: Path) -> Sample:
    port = free_port()
    with started(command(setting, port), port) as process:
        under_load(port, setting.connections, WARM_UP_S, requests)
        before = cpu_seconds(process.pid)
        load = under_load(port, setting.connections, setting.seconds, requests)
        cpu = cpu_seconds(process.pid) - before
    return Sample(load, 1000 * cpu / max(load.requests, 1))


def under_load(port: int, connections: int, seconds: float, requests: Path) -> Measured:
    """What a load generator in a process of its own has measured."""
    words = [sys.executable, "-m", "fusion.benchmarks.load", f"http://127.0.0.1:{port}", str(connections), str(seconds), str(requests)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=seconds + 300, check=True)
    measured = Measured(**json.loads(done.stdout))
    if not measured.requests:
        raise UserError(f"the server answered no request: {measured.first_failure[:500]}")
    return measured


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and its descendants (Linux)."""
    parents, times = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            entries = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        own = int(stat.parent.name)
        parents[own], times[own] = int(entries[1]), int(entries[11]) + int(entries[12])
    family = {pid}
    for _ in range(8):  # generations
        family |= {child for child, parent in parents.items() if parent in family}
    return sum(times.get(one, 0) for one in family) / os.sysconf("SC_CLK_TCK")
