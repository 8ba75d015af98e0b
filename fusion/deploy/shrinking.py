"""fusion shrink: a smaller model of a run, with what that costs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusion.deploy.comparison import Compared, compare, in_eager, size_of
from fusion.deploy.exporting import about_of, graph_of, write_graph, write_package
from fusion.deploy.int8 import RANGES, Quantised, Verdict, prepared, quantised_within
from fusion.deploy.latency import first_samples
from fusion.deploy.split_arrays import SplitArrays, lost
from fusion.errors import UserError
from fusion.packages.folder import check_free, new_folder, write_json
from fusion.packages.runtimes import OnnxRuntime
from fusion.predictor import Predictor, model_of
from fusion.runs.bundle import WEIGHTS

REPORT = "shrink.json"
SENSITIVITY_SAMPLES = 16  # on which the cost of each layer alone is measured


@dataclass(frozen=True)
class Shrunk:
    """A shrunk model. compared: by name, before and after. score: the name of the main score."""

    folder: Path
    score: str
    compared: dict[str, Compared]
    quantised: Quantised


def shrink_to_int8(
    run: str | Path,
    out: str | Path,
    *,
    checkpoint: str = "best",
    calibration_split: str = "val",
    calibration_samples: int = 128,
    samples: int | None = 2000,
    most_lost: float = 0.005,
    most_changed: float = 0.02,
    seconds: float = 2.0,
    replace: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Shrunk:
    """Writes a run's model as an INT8 package for ONNX Runtime on CPUs.

    Args:
        run: run folder.
        out: folder to write.
        checkpoint: best or last.
        calibration_split: split by whose samples activations are calibrated and layers are chosen; never test.
        calibration_samples: number of samples that calibrate.
        samples: number of samples of each split that are scored; None for all.
        most_lost: how much of the task's main score may be lost on that split; layers that cost more stay in float32.
        most_changed: the largest share of that split's samples whose answer (a class, the set of labels) may change: on few samples the
            score alone says little.
        seconds: of timing, for each model and number of samples.
        replace: whether an earlier package may be replaced.
        report: called with a line for each attempt.

    Raises UserError as `export` does, and for a split that isn't there, or is test.
    """
    if calibration_split == "test":
        raise UserError("--calibration_split test: layers would be chosen by the samples that judge the result; expected val or train")
    if not 0 <= most_lost < 1:
        raise UserError(f"--most_lost is {most_lost}; expected from 0 to below 1, such as 0.005 for half a point")
    if not 0 <= most_changed <= 1:
        raise UserError(f"--most_changed is {most_changed}; expected a share, from 0 to 1")
    folder, source = Path(out).expanduser(), Path(run).expanduser()
    check_free(folder, replace=replace)
    path, note = model_of(source, checkpoint)
    if note:
        report(f"note: {note}")
    predictor = Predictor.from_file(path, device="cpu")
    graph = graph_of(predictor)
    splits = {
        split: SplitArrays.of(source, predictor, graph.preprocessors, split, samples)
        for split in dict.fromkeys([calibration_split, "test"])
        if split == calibration_split or has_split(source, split)
    }
    chosen = splits[calibration_split]
    score = predictor.processor.task.monitor
    if score == "loss":
        raise UserError("this run's best checkpoint was chosen by the loss, of which single samples have none; give another task's monitor")
    threads = torch.get_num_threads()
    with new_folder(folder, replace=replace) as temporary:
        full, ready, small = (temporary / name for name in ("float32.onnx", "prepared.onnx", OnnxRuntime.file))
        write_graph(graph, "onnx", full)
        prepared(full, ready)
        load = partial(OnnxRuntime, names=graph.names, threads=threads)
        expected = chosen.values(load(full))
        before = chosen.score(expected, score)
        report(f"float32: {before:.4f} on {calibration_split} ({len(chosen):,} samples)")

        def judge(file: Path) -> Verdict:
            values = chosen.values(load(file))
            found, changed = chosen.score(values, score), chosen.changed(values, expected)
            missing = lost(predictor.processor.task, before, found)
            text = f"{found:.4f} on {calibration_split}, {missing:+.4f} lost, {changed:.1%} of the answers changed"
            return Verdict(missing <= most_lost and changed <= most_changed, found, text)

        def difference_of(file: Path) -> float:
            count = min(SENSITIVITY_SAMPLES, len(chosen))
            return float(np.abs(load(file)(first_samples(chosen.batches, count)) - expected[:count]).mean())

        calibration = first_batches(chosen, calibration_samples)
        quantised = quantised_within(ready, small, calibration, judge, difference_of, report)
        models = {
            "float32 (PyTorch)": (in_eager(graph), size_of(path / WEIGHTS) if path.is_dir() else size_of(full)),
            "float32 (ONNX Runtime)": (load(full), size_of(full)),
            "int8 (ONNX Runtime)": (load(small), size_of(small)),
        }
        compared = compare(models, splits, seconds=seconds)
        for file in (full, ready, ready.with_name(RANGES)):
            file.unlink(missing_ok=True)
        difference = float(np.abs(chosen.values(load(small)) - expected).max())
        about = about_of(predictor, graph, "onnx", run) | {"difference": difference, "batches": len(chosen.batches)}
        about["int8"] = {"layers": quantised.layers, "excluded": quantised.excluded, "calibration_split": calibration_split}
        write_json(temporary / REPORT, report_of(compared, quantised, score, threads))
        write_package(temporary, predictor, graph, about, run)
    return Shrunk(folder, score, compared, quantised)


def first_batches(samples: SplitArrays, most: int) -> list[dict[str, np.ndarray]]:
    """The batches of a split that together have about `most` samples, each cut into small ones for the memory of calibration."""
    small = []
    for batch in samples.batches:
        several = any(name.endswith("_image_index") for name in batch)  # whose images aren't as many as the samples
        size = len(next(iter(batch.values())))
        small += [batch] if several else [{n: array[i : i + 16] for n, array in batch.items()} for i in range(0, size, 16)]
    return small[: max(1, most // 16)]


def has_split(run: Path, split: str) -> bool:
    """Whether the run was scored on a split."""
    from fusion.data.record import Record

    record = Record.read(run)
    return record is None or split in record.columns["split"]


def report_of(compared: dict[str, Compared], quantised: Quantised, score: str, threads: int) -> dict[str, Any]:
    models = {name: one.plain() for name, one in compared.items()}
    return {"score": score, "threads": threads, "layers": quantised.layers, "excluded": quantised.excluded, "models": models}
