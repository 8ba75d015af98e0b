"""Export of a run: its model as one graph for a runtime, checked against the run on every pattern of missing inputs."""

import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fusion.console import log_level
from fusion.deploy.card import card_of
from fusion.deploy.graph import Graph, checked_batches
from fusion.errors import UserError, first_line, nearest
from fusion.extras import install
from fusion.packages.folder import CARD, FORMAT, PACKAGE, PROCESSOR, check_free, new_folder, write_json
from fusion.packages.package import flat_arrays
from fusion.packages.runtimes import RUNTIMES, Runtime
from fusion.predictor import Predictor, model_of
from fusion.processing.answers import state_of

Target = Literal["onnx", "torch", "aot"]
TOLERANCE = 1e-5
OPSET, OLDEST_OPSET = 18, 18
NEWEST_OPSET = 22  # 23 has an operator of attention, which ONNX Runtime can't run with such masks
CPU_LEVEL = "x86-64-v3"  # AVX2: every server and laptop of the last ten years
# What logs progress, a missing GPU compiler, and that the code is compiled for an older CPU than this one.
EXPORTERS = (
    "onnxscript",
    "torch.onnx",
    "torch.export",
    "torch.export.pt2_archive._package",
    "torch.utils.cpp_extension",
    "torch._dynamo",
    "torch._inductor",
)


@dataclass(frozen=True)
class Exported:
    """What an export wrote. difference: the largest of any value from the run's. seconds: that it took. note: about the checkpoint."""

    folder: Path
    difference: float
    batches: int
    seconds: float
    note: str


def export(
    run: str | Path, to: Target, out: str | Path, *, checkpoint: str = "best", opset: int = OPSET, replace: bool = False
) -> Exported:
    """Writes a run's model as a package, and checks that it answers like the run.

    Args:
        run: run folder, model folder or checkpoint file.
        to: "onnx" (ONNX Runtime), "torch" (a program of torch.export), "aot" (compiled by AOTInductor for CPUs with AVX2).
        out: folder to write; nothing is left of it if the export fails.
        checkpoint: best or last.
        opset: version of ONNX's operators, for onnx.
        replace: whether an earlier package in `out` may be replaced.

    Raises UserError for a run without checkpoint, a task, input, encoder or head that can't be exported, an opset that is too old, a folder
    that can't be written, and a package whose values differ from the run's by more than 1e-5.
    """
    started = time.monotonic()
    if to not in RUNTIMES:
        raise UserError(f"--to {to}: {nearest(to, RUNTIMES)}")
    if to == "onnx" and opset < OLDEST_OPSET:
        raise UserError(f"--opset {opset} is too old: attention with masks needs at least {OLDEST_OPSET}")
    if to == "onnx" and opset > NEWEST_OPSET:
        raise UserError(f"--opset {opset}: ONNX Runtime can't run its attention; expected {OLDEST_OPSET} to {NEWEST_OPSET}")
    folder = Path(out).expanduser()
    check_free(folder, replace=replace)
    path, note = model_of(run, checkpoint)
    predictor = Predictor.from_file(path, device="cpu")
    graph = graph_of(predictor)
    with new_folder(folder, replace=replace) as temporary:
        file = temporary / RUNTIMES[to].file
        write_graph(graph, to, file, opset)
        difference, batches = largest_difference(graph, RUNTIMES[to](file, graph.names))
        if not difference <= TOLERANCE:
            raise UserError(
                f"the exported model differs from the run by {difference:.2g}, more than {TOLERANCE:g}: it isn't written. Try another --to"
            )
        about = about_of(predictor, graph, to, run) | {"difference": difference, "batches": batches}
        write_package(temporary, predictor, graph, about, run)
    return Exported(folder, difference, batches, time.monotonic() - started, note)


def graph_of(predictor: Predictor) -> Graph:
    """The graph of a model. Raises UserError for a task or an input that can't be exported."""
    state_of(predictor.processor.task.answering())
    preprocessors = {name: predictor.processor.inputs[name].preprocessor() for name in predictor.modalities}
    return Graph(predictor.model, predictor.processor.task, preprocessors)


def write_graph(graph: Graph, to: Target, file: Path, opset: int = OPSET) -> None:
    """Traces the graph and writes it for a runtime. Raises UserError naming the head and the encoders if it can't be traced."""
    tensors, dynamic = graph.trace_inputs()
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(graph, tensors, dynamic_shapes=(dynamic,), strict=False)
            if to == "onnx":
                write_onnx(program, graph, tensors, file, opset)
            elif to == "torch":
                torch.export.save(program, file)
            else:
                options = {"cpp.march": CPU_LEVEL, "cpp.simdlen": 256, "compile_threads": 1}
                torch._inductor.aoti_compile_and_package(program, package_path=os.fspath(file), inductor_configs=options)
    except OSError:  # the disk
        raise
    except Exception as error:  # of any type, from within the exporter or a model's own code
        if "InvalidCxxCompiler" in str(error):
            raise UserError("exporting to aot needs a C++ compiler: install g++, or set CXX") from error
        parts = ", ".join(f"{name}: {type(encoder).__name__}" for name, encoder in graph.model.encoders.items())
        reason = first_line(error)[:300]
        raise UserError(
            f"the head {type(graph.model.head).__name__} with these encoders ({parts}) can't be exported to {to} "
            f"({type(error).__name__}: {reason})"
        ) from error


def write_onnx(program: Any, graph: Graph, tensors: tuple[torch.Tensor, ...], file: Path, opset: int) -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"exporting to onnx needs onnx and onnxscript: {install('onnxscript')}") from error
    torch.onnx.export(
        program,
        tensors,
        os.fspath(file),
        dynamo=True,
        opset_version=opset,
        input_names=graph.names,
        output_names=["values"],
        external_data=False,
        verbose=False,
    )


def largest_difference(graph: Graph, runtime: Runtime) -> tuple[float, int]:
    """The largest difference between the values of the graph in PyTorch and in a runtime, NaN where either has one; and over how many
    batches."""
    largest, count = 0.0, 0
    for _, batch in checked_batches(graph.preprocessors):
        arrays = flat_arrays(batch)
        with torch.inference_mode():
            expected = graph(*(torch.from_numpy(array) for array in arrays.values())).numpy()
        difference = np.abs(runtime(arrays).astype(np.float64) - expected).max(initial=0.0)
        largest, count = max(largest, float(difference)) if difference == difference else float("nan"), count + 1
        if largest != largest:
            break
    return largest, count


def about_of(predictor: Predictor, graph: Graph, to: Target, run: str | Path) -> dict[str, Any]:
    """The description of a package."""
    model = predictor.model
    return {
        "format": FORMAT,
        "fusion": version("fusion"),
        "to": to,
        "torch": torch.__version__,
        "run": Path(run).expanduser().resolve().name,
        "task": type(predictor.processor.task).__name__,
        "head": type(model.head).__name__,
        "encoders": {name: type(encoder).__name__ for name, encoder in model.encoders.items()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "width": graph(*(torch.from_numpy(array) for array in example(graph).values())).shape[1],
        "graph_inputs": graph.names,
    }


def example(graph: Graph) -> dict[str, np.ndarray]:
    return flat_arrays(next(iter(checked_batches(graph.preprocessors)))[1])


def write_package(folder: Path, predictor: Predictor, graph: Graph, about: Mapping[str, Any], run: str | Path) -> None:
    """Writes everything beside the model: package.json, processor.json, the tokenizers, and the card."""
    inputs = {}
    for name, preprocessor in graph.preprocessors.items():
        state = {"form": preprocessor.form, **preprocessor.state()}
        if "tokenizer" in state:
            state["tokenizer"] = dict(state["tokenizer"])
            state["tokenizer_file"] = f"{name}.tokenizer.json"
            (folder / state["tokenizer_file"]).write_text(state["tokenizer"].pop("backend"), encoding="utf-8")
        inputs[name] = state
    write_json(folder / PROCESSOR, {"inputs": inputs, "answers": state_of(predictor.processor.task.answering())})
    write_json(folder / PACKAGE, dict(about))
    (folder / CARD).write_text(card_of(about, run, predictor), encoding="utf-8")


@contextmanager
def quiet() -> Iterator[None]:
    """Context without the exporters' warnings and progress."""
    with log_level(logging.ERROR, *EXPORTERS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
