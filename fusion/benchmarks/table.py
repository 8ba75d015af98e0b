"""fusion benchmark table: time and memory of reading a large manifest, compared with pyarrow alone, which doesn't report bad rows."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.csv

from fusion.benchmarks.processes import in_new_process, memory_mib
from fusion.console import aligned
from fusion.data import FusionData
from fusion.data.issues import DataIssues
from fusion.data.table import Columns, read_table
from fusion.tasks import Classification

OURS, ALONE = "a manifest", "pyarrow alone"


def benchmark_table(rows: int, rounds: int) -> int:
    """Print time and memory of both, alternating, with every reading in a new process."""
    lines = [["", "s of CPU", "of pyarrow's (in rounds)", "peak MiB", "of pyarrow's"]]
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (
            ("", "what colour is the {} shape in picture {}?"),
            (", texts in quotes", '"what colour, is the {} shape in {}?"'),
        ):
            path = Path(folder) / "manifest.csv"
            write(path, rows, text)
            measured: dict[str, list[tuple[float, float]]] = {OURS: [], ALONE: []}
            for _ in range(rounds):
                for reader, costs in measured.items():
                    costs.append(in_new_process(cost, reader, path))
            for reader, costs in measured.items():
                seconds, peaks = ([pair[i] for pair in costs] for i in (0, 1))
                time_ratios, peak_ratios = (
                    [own / base[i] for own, base in zip(values, measured[ALONE], strict=True)] for i, values in enumerate((seconds, peaks))
                )
                spread = f"{statistics.median(time_ratios):.2f} ({min(time_ratios):.2f} to {max(time_ratios):.2f})"
                entries = [
                    f"{statistics.median(seconds):.2f}",
                    spread,
                    f"{statistics.median(peaks):.0f}",
                    f"{statistics.median(peak_ratios):.2f}",
                ]
                lines.append([reader + name, *(entries if reader == OURS else [entries[0], "", entries[2], ""])])
    print(f"{rows:,} rows of image, text, label and split; median of {rounds} rounds\n\n{aligned(lines)}")
    return 0


def write(path: Path, rows: int, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write("image,text,label,split\n")
        for i in range(rows):
            file.write(f"images/{i % 50_000:06}.jpg,{text.format(i % 977, i)},class {i % 13},{'train' if i % 10 else 'test'}\n")


def cost(reader: str, path: Path) -> tuple[float, float]:
    """CPU seconds of all threads, and peak memory in MiB beyond what the process used before."""
    read = READERS[reader]
    before, began = memory_mib("VmRSS"), time.process_time()
    result = read(path)
    seconds, peak = time.process_time() - began, memory_mib("VmHWM") - before
    del result
    return seconds, peak


def read_manifest(path: Path) -> object:
    inputs = FusionData(manifest=str(path)).kinds(("image", "text"))
    return read_table(path, Columns(), inputs, task=Classification(), issues=DataIssues())


READERS: dict[str, Callable[[Path], object]] = {OURS: read_manifest, ALONE: pyarrow.csv.read_csv}
