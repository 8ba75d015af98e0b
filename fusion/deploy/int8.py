"""INT8 quantisation of an exported model for ONNX Runtime on CPUs.

Convolutions are quantised statically: the ranges of their inputs are calibrated on validation samples, weights per output channel.
Matrix products are quantised dynamically: the ranges of their inputs are computed for each batch. Embedding tables are stored in 8 bits.
Source: Jacob et al. (2018), "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference".
"""

import inspect
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fusion.console import log_level
from fusion.errors import UserError
from fusion.extras import install

RANGES = "ranges.json"  # of activations
STATIC, DYNAMIC = ("Conv",), ("MatMul", "Gemm", "Gather")


class Verdict(NamedTuple):
    """What a quantised model costs on validation. fits: whether it stays within the limits. score: its main score. text: for the report."""

    fits: bool
    score: float
    text: str


@dataclass(frozen=True)
class Quantised:
    """What was quantised. layers: number of layers in 8 bits; excluded: the names of those that stay in 32 bits, in the order in which they
    were excluded. score: on validation."""

    layers: int
    excluded: list[str] = field(default_factory=list)
    score: float = float("nan")


def quantise(source: Path, target: Path, calibration: Sequence[Mapping[str, np.ndarray]], exclude: Sequence[str] = ()) -> int:
    """Writes the INT8 model of a float32 .onnx file; returns the number of quantised layers.

    Args:
        source: the .onnx file, prepared by `prepared`.
        target: file to write.
        calibration: batches by the names of the graph's inputs.
        exclude: names of layers that stay in float32.
    """
    quantization, onnx = libraries()
    # ONNX Runtime first divides a Gemm into a MatMul of this name and an Add.
    excluded = [*exclude, *(f"{name}_MatMul" for name in exclude)]
    # Ranges are computed once, where this version of ONNX Runtime can keep them.
    parameters = inspect.signature(quantization.quantize_static).parameters
    cached = {"calibration_cache_path": source.with_name(RANGES)} if "calibration_cache_path" in parameters else {}
    between = target.with_name(f".{target.name}-static")
    try:
        with quiet():
            first = source
            if any(node.op_type in STATIC for node in onnx.load(os.fspath(source)).graph.node if node.name not in exclude):
                quantization.quantize_static(
                    os.fspath(source),
                    os.fspath(between),
                    Calibration(calibration, graph_inputs(onnx, source)),
                    quant_format=quantization.QuantFormat.QDQ,
                    op_types_to_quantize=list(STATIC),
                    per_channel=True,
                    weight_type=quantization.QuantType.QInt8,
                    activation_type=quantization.QuantType.QUInt8,
                    nodes_to_exclude=excluded,
                    extra_options={"ActivationSymmetric": False, "WeightSymmetric": True},
                    **cached,
                )
                first = between
            quantization.quantize_dynamic(
                os.fspath(first),
                os.fspath(target),
                op_types_to_quantize=list(DYNAMIC),
                per_channel=True,
                # 7 bits on CPUs without VNNI, whose products of 8 bits saturate.
                reduce_range=not has_vnni(),
                weight_type=quantization.QuantType.QInt8,
                nodes_to_exclude=excluded,
                extra_options={"MatMulConstBOnly": True},
            )
    finally:
        between.unlink(missing_ok=True)
    return sum(name not in exclude for name in layers(source))


def quantised_within(
    source: Path,
    target: Path,
    calibration: Sequence[Mapping[str, np.ndarray]],
    judge: Callable[[Path], Verdict],
    difference: Callable[[Path], float],
    report: Callable[[str], None] = lambda line: None,
) -> Quantised:
    """Quantises a model, leaving layers in float32 until it stays within the limits on validation.

    Layers are excluded in the order of the difference that each alone makes to the values, the largest first: 1, 2, 4, ... of them. Only
    convolutions are tried if the model without them stays within the limits, or only the rest.

    Args:
        source: the .onnx file, prepared by `prepared`.
        target: file to write.
        calibration: batches by the names of the graph's inputs.
        judge: of a model file, what it costs on validation.
        difference: of a model file, the mean difference of its values from those of the source.
        report: called with a line for each attempt.
    """
    every = layers(source)
    count = quantise(source, target, calibration)
    verdict = judge(target)
    report(f"{count} layers in 8 bits: {verdict.text}")
    if verdict.fits:
        return Quantised(count, [], verdict.score)
    candidates = every
    for kind, group in by_kind(source).items():
        count = quantise(source, target, calibration, group)
        verdict = judge(target)
        report(f"{count} layers in 8 bits, without {kind}: {verdict.text}")
        if verdict.fits and len(group) < len(candidates):
            candidates = group
    costs = {}
    for name in candidates:
        quantise(source, target, calibration, [other for other in every if other != name])
        costs[name] = difference(target)
    ordered = sorted(candidates, key=lambda name: -costs[name])
    excluded = 1
    while True:
        chosen = ordered[:excluded]
        count = quantise(source, target, calibration, chosen)
        verdict = judge(target)
        report(f"{count} layers in 8 bits, {len(chosen)} excluded: {verdict.text}")
        if verdict.fits or len(chosen) == len(candidates):
            return Quantised(count, chosen, verdict.score)
        excluded *= 2


def by_kind(path: Path) -> dict[str, list[str]]:
    """The layers that are quantised statically, and the others, by what they are."""
    _, onnx = libraries()
    kinds = {node.name: node.op_type for node in onnx.load(os.fspath(path)).graph.node}
    convolutions = [name for name in layers(path) if kinds[name] in STATIC]
    groups = {"convolutions": convolutions, "matrix products and tables": [name for name in layers(path) if name not in convolutions]}
    return {kind: group for kind, group in groups.items() if group} if all(groups.values()) else {}


def prepared(source: Path, target: Path) -> None:
    """Writes the model with shapes inferred and batch normalisation folded into convolutions, as quantisation needs it."""
    _, onnx = libraries()
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with quiet():
        quant_pre_process(os.fspath(source), os.fspath(target), skip_symbolic_shape=True, skip_onnx_shape=False)
    model = onnx.load(os.fspath(target))
    for i, node in enumerate(model.graph.node):  # names by which layers are excluded
        node.name = node.name or f"{node.op_type}_{i}"
    onnx.save(model, os.fspath(target))


def layers(path: Path) -> list[str]:
    """The names of the layers that can be quantised: those with constant weights."""
    _, onnx = libraries()
    graph = onnx.load(os.fspath(path)).graph
    constants = {one.name for one in graph.initializer}
    tables = {one.name for one in graph.initializer if len(one.dims) == 2 and one.data_type == onnx.TensorProto.FLOAT}
    return [
        node.name
        for node in graph.node
        if (node.op_type in (*STATIC, "MatMul", "Gemm") and node.input[1] in constants)
        or (node.op_type == "Gather" and node.input[0] in tables)
    ]


class Calibration:
    """Feeds batches to ONNX Runtime's calibration, one sample at a time in memory of its own making."""

    def __init__(self, batches: Sequence[Mapping[str, np.ndarray]], names: Sequence[str]) -> None:
        self.batches, self.names = batches, names
        self.rest: Iterator[Any] = iter(())
        self.rewind()

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.rest, None)

    def rewind(self) -> None:
        self.rest = ({name: batch[name] for name in self.names} for batch in self.batches)


def graph_inputs(onnx: Any, path: Path) -> list[str]:
    graph = onnx.load(os.fspath(path), load_external_data=False).graph
    constants = {one.name for one in graph.initializer}
    return [one.name for one in graph.input if one.name not in constants]


def has_vnni() -> bool:
    """Whether the CPU adds products of 8 bits in 32 bits; True where that is unknown."""
    try:
        return "vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True


def libraries() -> tuple[Any, Any]:
    try:
        import onnx
        from onnxruntime import quantization
    except ImportError as error:
        raise UserError(f"INT8 needs onnx and onnxruntime: {install('onnx')}") from error
    return quantization, onnx


def quiet() -> AbstractContextManager[None]:
    """Context without the advice that ONNX Runtime logs."""
    return log_level(logging.ERROR, "")
