"""fusion benchmark packages: latency and memory of a run's packages, beside PyTorch operator by operator and compiled."""

import logging
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fusion.benchmarks.package_memory import package_peak_mib
from fusion.benchmarks.processes import in_new_process, memory_mib
from fusion.console import aligned, log_level
from fusion.deploy.comparison import BATCHES, in_eager
from fusion.deploy.exporting import export, graph_of
from fusion.deploy.graph import example_batch
from fusion.deploy.latency import latencies
from fusion.packages.package import Package, flat_arrays
from fusion.packages.runtimes import RUNTIMES, Runtime
from fusion.predictor import Predictor

EAGER, COMPILED = "PyTorch", "torch.compile"


def benchmark_packages(run: Path, seconds: float) -> int:
    """Print latency (p50, p99) of 1 and of 32 samples and peak memory of each package, PyTorch and torch.compile, in turns in one run."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        took = {}
        for to in RUNTIMES:
            start = time.monotonic()
            export(run, to, Path(folder) / to)  # type: ignore[arg-type]
            took[to] = time.monotonic() - start
        graph = graph_of(Predictor.load(run, device="cpu"))
        models: dict[str, Runtime] = {EAGER: in_eager(graph), COMPILED: compiled(run)}
        models |= {to: Package.load(Path(folder) / to, threads=threads).runtime for to in RUNTIMES}
        rng = np.random.default_rng(0)
        batches = {count: flat_arrays(example_batch(graph.preprocessors, count, rng)) for count in BATCHES}
        times = {b: latencies({name: partial(model, batches[b]) for name, model in models.items()}, seconds=seconds) for b in BATCHES}
        largest = batches[BATCHES[-1]]
        peaks = {name: in_new_process(peak_mib, name == COMPILED, run, largest, threads) for name in (EAGER, COMPILED)}
        peaks |= {to: in_new_process(package_peak_mib, Path(folder) / to, largest, threads) for to in RUNTIMES}
    titles = [f"{quantile} ms ({b})" for b in BATCHES for quantile in ("p50", "p99")]
    lines = [["", *titles, *(f"/ {EAGER} ({b})" for b in BATCHES), "peak MiB", "export s"]]
    for name in models:
        own = [f"{value:.2f}" for b in BATCHES for value in (times[b][name].p50, times[b][name].p99)]
        shares = [f"{times[b][name].p50 / times[b][EAGER].p50:.2f}" for b in BATCHES]
        lines.append([name, *own, *shares, f"{peaks[name]:.0f}", f"{took[name]:.0f}" if name in took else ""])
    print(f"{threads} threads, arrays to values, in turns\n\n{aligned(lines)}")
    return 0


def compiled(run: Path) -> Runtime:
    """The run's model by torch.compile, for any number of samples and tokens, as packages are."""
    graph = graph_of(Predictor.load(run, device="cpu"))
    model = torch.compile(graph)
    tensors, dynamic = graph.trace_inputs()
    for tensor, dims in zip(tensors, dynamic, strict=True):
        # Not dynamic=True, by which the size of images would be too, whose padding takes minutes to compile.
        torch._dynamo.mark_dynamic(tensor, list(dims))
    with log_level(logging.ERROR, "torch.utils.cpp_extension"), torch.inference_mode():  # which misses a GPU
        model(*tensors)

    @torch.inference_mode()
    def call(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        return model(*(torch.from_numpy(arrays[name]) for name in graph.names)).numpy()

    return call


def peak_mib(compile: bool, run: Path, arrays: Mapping[str, np.ndarray], threads: int) -> float:
    """Peak memory of a new process that loads a run and answers a batch three times."""
    torch.set_num_threads(threads)
    model = compiled(run) if compile else in_eager(graph_of(Predictor.load(run, device="cpu")))
    for _ in range(3):
        model(arrays)
    return memory_mib("VmHWM")
