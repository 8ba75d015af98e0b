"""fusion benchmark gpu: a page of checks and measurements that show whether a machine with GPUs trains correctly, and how fast.

Checks that run the command are in gpu_runs, those that run models in this process in gpu_models. Without a GPU everything runs on the CPU
at the smallest size: checks that need no GPU are evaluated; of the others it is only checked that they run.
"""

import platform
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fusion.benchmarks.findings import Finding
from fusion.benchmarks.gpu_models import fit_loop, heads, long_texts, overlap, whole_model
from fusion.benchmarks.gpu_runs import Runs, compressed, killed, lost_rank, precisions
from fusion.session import choose_kernels, silence_harmless_warnings

Check = Callable[[], Iterator[Finding]]


def benchmark_gpu(scenes: int) -> int:
    """Print the page; returns 0 if nothing failed. scenes: number of scenes that the runs train on (8 questions each)."""
    silence_harmless_warnings()
    choose_kernels("highest")
    gpus = torch.cuda.device_count()
    print(machine(), flush=True)
    if not gpus:
        print("no GPU here: checks that need none are evaluated, the others only run on the CPU at the smallest size\n", flush=True)
    began, failed = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder), scenes if gpus else min(scenes, 150), on_gpu=gpus > 0)
        checks: list[Check] = [
            lambda: precisions(runs),
            lambda: killed(runs),
            lambda: heads(gpus > 0),
            lambda: whole_model(gpus > 0),
            lambda: long_texts(gpus > 0),
            lambda: fit_loop(runs),
        ]
        if gpus != 1:
            checks += [lambda: compressed(runs), lambda: lost_rank(runs), lambda: overlap(gpus)]
        for check in checks:
            for finding in findings(check):
                print(finding, flush=True)
                failed += finding.good is False
    print(f"\n{time.monotonic() - began:,.0f} s; {'nothing failed' if not failed else f'{failed} checks FAILED'}")
    return 1 if failed else 0


def findings(check: Check) -> Iterator[Finding]:
    """The findings of a check. An exception becomes a failure, so that other checks still run, and its traceback is printed."""
    try:
        yield from check()
    except Exception as error:
        traceback.print_exc()
        yield Finding(False, "the check itself", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}")


def machine() -> str:
    """Versions and devices, on one line."""
    parts = [f"torch {torch.__version__}", f"Python {platform.python_version()}"]
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        parts += [f"{torch.cuda.device_count()} x {', '.join(sorted(names))}", f"CUDA {torch.version.cuda}"]
        parts += [f"cuDNN {torch.backends.cudnn.version()}", f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"]
    return ", ".join(parts)
