"""fusion benchmark table: reading a large manifest, beside pyarrow alone, which promises nothing of line numbers and bad rows."""

import re
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pyarrow.csv

from fusion.console import aligned
from fusion.data import FusionData
from fusion.data.ledger import Ledger
from fusion.data.table import Columns, read_table
from fusion.tasks import Classification

OURS, ALONE = "a manifest", "pyarrow alone"


def benchmark_table(rows: int, rounds: int) -> int:
    """Print time and memory of both, in turns, each reading in a process of its own."""
    table = [["", "s of CPU", "of pyarrow's (in rounds)", "peak MiB", "of pyarrow's"]]
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (
            ("", "what colour is the {} shape in picture {}?"),
            (", texts in quotes", '"what colour, is the {} shape in {}?"'),
        ):
            path = Path(folder) / "manifest.csv"
            write(path, rows, text)
            found: dict[str, list[tuple[float, float]]] = {OURS: [], ALONE: []}
            for _ in range(rounds):
                for who, measured in found.items():
                    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as alone:
                        measured.append(alone.submit(cost, who, path).result())
            for who, measured in found.items():
                seconds, peaks = ([one[place] for one in measured] for place in (0, 1))
                of, of_peaks = (
                    [own / base[place] for own, base in zip(each, found[ALONE], strict=True)] for place, each in enumerate((seconds, peaks))
                )
                spread = f"{statistics.median(of):.2f} ({min(of):.2f} to {max(of):.2f})"
                cells = [
                    f"{statistics.median(seconds):.2f}",
                    spread,
                    f"{statistics.median(peaks):.0f}",
                    f"{statistics.median(of_peaks):.2f}",
                ]
                table.append([who + name, *(cells if who == OURS else [cells[0], "", cells[2], ""])])
    print(f"{rows:,} rows of image, text, label and split; median of {rounds} rounds\n\n{aligned(table)}")
    return 0


def write(path: Path, rows: int, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write("image,text,label,split\n")
        for i in range(rows):
            file.write(f"images/{i % 50_000:06}.jpg,{text.format(i % 977, i)},class {i % 13},{'train' if i % 10 else 'test'}\n")


def cost(who: str, path: Path) -> tuple[float, float]:
    """Seconds of CPU, of all threads, and the peak of memory in MiB above what the process had before."""
    way = READERS[who]
    before, began = memory_mib("VmRSS"), time.process_time()
    held = way(path)
    seconds, peak = time.process_time() - began, memory_mib("VmHWM") - before
    del held
    return seconds, peak


def read_manifest(path: Path) -> object:
    inputs = FusionData(manifest=str(path)).kinds(("image", "text"))
    return read_table(path, Columns(), inputs, task=Classification(), ledger=Ledger())


READERS: dict[str, Callable[[Path], object]] = {OURS: read_manifest, ALONE: pyarrow.csv.read_csv}


def memory_mib(what: str) -> float:
    """Linux' figure of this process: VmRSS now, VmHWM at most."""
    found = re.search(rf"^{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024
