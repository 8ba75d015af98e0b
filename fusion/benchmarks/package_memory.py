"""Peak memory of a package's process, in a module that imports no torch."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fusion.benchmarks.processes import memory_mib
from fusion.packages.package import Package


def package_peak_mib(folder: Path, arrays: Mapping[str, np.ndarray], threads: int) -> float:
    """Peak memory of a new process that loads a package and answers a batch three times."""
    model = Package.load(folder, threads=threads).runtime
    for _ in range(3):
        model(arrays)
    return memory_mib("VmHWM")
