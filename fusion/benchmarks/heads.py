"""fusion benchmark heads: parameters, time and memory of each head, compared with a plain implementation."""

import gc
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusion.benchmarks.plain_heads import plain_output
from fusion.console import aligned
from fusion.errors import UserError
from fusion.features import Features
from fusion.heads import FusionHead, available
from fusion.heads.registry import HEADS

CLASSES = 100
LEVELS = 4


def benchmark_heads(pattern: str, *, batch: int, text: int, image: int, width: int, rounds: int, options: dict[str, Any]) -> None:
    """Print parameters, times and peak memory of the matching heads, and their ratios to the plain implementations."""
    print(
        f"{batch} samples, text {text} tokens x {width}, image {image} x {width}, float32 on {device()}, "
        f"{torch.get_num_threads()} threads, median of {rounds} rounds\n"
        "plain: a plain PyTorch implementation (fusion/benchmarks/plain_heads.py), alternating in the same run\n"
    )
    lines = [["", "parameters", "forward ms", "/ plain", "with backward ms", "/ plain", "peak MiB", "/ plain"]]
    for name in available(pattern):
        lines.append([name, *compare(*build(name, {"text": text, "image": image}, batch, width, options), rounds)])
    print(aligned(lines))


def curve(pattern: str, *, batch: int, image: int, width: int, rounds: int, options: dict[str, Any]) -> None:
    """Print how time and peak memory of a training pass grow with the number of text tokens, for the matching heads that read tokens."""
    lengths = [512, 1024, 2048, 4096, 8192]
    print(f"{batch} samples, image {image} tokens x {width}, float32 on {device()}, forward and backward: ms / peak MiB by text tokens\n")
    lines = [["", *[f"{length:,}" for length in lengths]]]
    for name in [name for name in available(pattern) if HEADS[name].stage in ("tokens", "embeddings")]:
        entries = []
        for length in lengths:
            head, inputs = build(name, {"text": length, "image": image}, batch, width, options)
            training_pass = partial(run_pass, head, partial(output, head, inputs), True)
            (times,) = alternate([training_pass], rounds)
            peak = peak_bytes(training_pass, partial(clear_gradients, head, inputs))
            entries.append(f"{1000 * statistics.median(times):,.0f} / {peak / 2**20:,.0f}")
        lines.append([name, *entries])
    print(aligned(lines))


def compare(head: FusionHead, inputs: Any, rounds: int) -> list[str]:
    """The entries of a head's line."""
    forwards: list[Callable[[], Tensor]] = [partial(output, head, inputs), partial(plain_output, head, inputs)]
    check_same_output(head, forwards)
    entries = [f"{sum(p.numel() for p in head.parameters()):,}"]
    for backward in (False, True):
        own, plain = alternate([partial(run_pass, head, forward, backward) for forward in forwards], rounds)
        ratio = statistics.median(a / b for a, b in zip(own, plain, strict=True))
        entries += [f"{1000 * statistics.median(own):.2f}", f"{ratio:.2f}"]
    own_peak, plain_peak = (
        peak_bytes(partial(run_pass, head, forward, True), clear=partial(clear_gradients, head, inputs)) for forward in forwards
    )
    return [*entries, f"{own_peak / 2**20:.1f}", f"{own_peak / plain_peak:.2f}"]


@torch.no_grad()
def check_same_output(head: FusionHead, forwards: list[Callable[[], Tensor]]) -> None:
    """Raises UserError if the plain implementation computes something else, since it doesn't support all options."""
    head.eval()
    try:
        own, plain = (forward() for forward in forwards)
        same = torch.allclose(own, plain, atol=1e-3, rtol=1e-3)
    except AttributeError:  # a module that the option replaces
        same = False
    head.train()
    if not same:
        raise UserError(
            f"the plain implementation of {type(head).__name__} (fusion/benchmarks/plain_heads.py) doesn't know these options; try --curve"
        )


def output(head: FusionHead, inputs: Any) -> Tensor:
    return head(inputs).output


def run_pass(head: FusionHead, forward: Callable[[], Tensor], backward: bool) -> None:
    """One forward pass; with `backward` also the gradients of every parameter and of the features."""
    if backward:
        head.zero_grad()
        forward().sum().backward()
    else:
        with torch.no_grad():
            forward()


def clear_gradients(head: FusionHead, inputs: Any) -> None:
    """Set all gradients to None, so that every measured pass allocates them."""
    head.zero_grad()
    for levels in inputs.values():
        for f in levels if isinstance(levels, list) else [levels]:
            f.tokens.grad = f.pooled.grad = None


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build(name: str, counts: dict[str, int], batch: int, width: int, options: dict[str, Any]) -> tuple[FusionHead, Any]:
    """A head with these options, and random features for it with so many tokens per modality."""
    torch.manual_seed(0)
    levels = LEVELS if HEADS[name].stage == "levels" else 0
    cls: Any = HEADS[name]
    head = cls({m: [width] * levels or width for m in counts}, CLASSES, **options).to(device())
    inputs = {m: features(batch, count, width) for m, count in counts.items()}
    return head, {m: [f] * levels or f for m, f in inputs.items()}


def features(batch: int, count: int, width: int) -> Features:
    """Random features that require gradients; in every other sample the last quarter of the tokens is padding."""
    mask = torch.ones(batch, count, dtype=torch.bool, device=device())
    mask[::2, count - count // 4 :] = False
    tokens = torch.randn(batch, count, width, device=device(), requires_grad=True)
    return Features(tokens, mask, torch.randn(batch, width, device=device(), requires_grad=True))


def alternate(functions: list[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Seconds of each function in each round; the order is reversed every other round, and calls are repeated to last at least 0.01 s."""
    repeats = []
    for function in functions:
        function()
        repeats.append(max(1, int(0.02 / seconds(function, 1))))
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(rounds):
        for i in range(len(functions))[:: 1 if turn % 2 else -1]:
            times[i].append(seconds(functions[i], max(repeats)))
    return times


def seconds(function: Callable[[], None], repeats: int) -> float:
    """Mean seconds of a call."""
    synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronize()
    return (time.perf_counter() - began) / repeats


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(function: Callable[[], None], clear: Callable[[], None] = lambda: None) -> int:
    """Peak memory of the tensors allocated by one call, after calling `clear`."""
    clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler's warning about missing GPUs
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    allocated = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak
