"""fusion benchmark heads: what each head costs, beside the plainest way to write it."""

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
    """Print parameters, times and peak memory of the heads that match, and their ratios to the plain formulations."""
    print(
        f"{batch} samples, text {text} tokens x {width}, image {image} x {width}, float32 on {device()}, "
        f"{torch.get_num_threads()} threads, median of {rounds} rounds\n"
        "plain: the plainest PyTorch of the formula (fusion/benchmarks/plain_heads.py), in turns in the same run\n"
    )
    rows = [["", "parameters", "forward ms", "of plain", "with backward ms", "of plain", "peak MiB", "of plain"]]
    for name in available(pattern):
        rows.append([name, *compare(*made(name, {"text": text, "image": image}, batch, width, options), rounds)])
    print(aligned(rows))


def curve(pattern: str, *, batch: int, image: int, width: int, rounds: int, options: dict[str, Any]) -> None:
    """Print how time and peak memory of a training pass grow with the text's tokens, for the heads that match and read tokens."""
    lengths = [512, 1024, 2048, 4096, 8192]
    print(f"{batch} samples, image {image} tokens x {width}, float32 on {device()}, forward and backward: ms / peak MiB by text tokens\n")
    rows = [["", *[f"{length:,}" for length in lengths]]]
    for name in [name for name in available(pattern) if HEADS[name].stage in ("tokens", "embeddings")]:
        cells = []
        for length in lengths:
            head, given = made(name, {"text": length, "image": image}, batch, width, options)
            one = partial(once, head, partial(output, head, given), True)
            (times,) = taking_turns([one], rounds)
            peak = peak_bytes(one, partial(forget_gradients, head, given))
            cells.append(f"{1000 * statistics.median(times):,.0f} / {peak / 2**20:,.0f}")
        rows.append([name, *cells])
    print(aligned(rows))


def compare(head: FusionHead, given: Any, rounds: int) -> list[str]:
    """The cells of a head's row."""
    ways: list[Callable[[], Tensor]] = [partial(output, head, given), partial(plain_output, head, given)]
    refuse_unlike(head, ways)
    cells = [f"{sum(p.numel() for p in head.parameters()):,}"]
    for backward in (False, True):
        own, other = taking_turns([partial(once, head, way, backward) for way in ways], rounds)
        ratio = statistics.median(a / b for a, b in zip(own, other, strict=True))
        cells += [f"{1000 * statistics.median(own):.2f}", f"{ratio:.2f}"]
    own_peak, plain_peak = (peak_bytes(partial(once, head, way, True), forget=partial(forget_gradients, head, given)) for way in ways)
    return [*cells, f"{own_peak / 2**20:.1f}", f"{own_peak / plain_peak:.2f}"]


@torch.no_grad()
def refuse_unlike(head: FusionHead, ways: list[Callable[[], Tensor]]) -> None:
    """Raises UserError where the plain formulation computes something else: it doesn't know all options."""
    head.eval()
    try:
        own, plain = (way() for way in ways)
        same = torch.allclose(own, plain, atol=1e-3, rtol=1e-3)
    except AttributeError:  # a part that the option replaces
        same = False
    head.train()
    if not same:
        raise UserError(
            f"the plain formulation of {type(head).__name__} (fusion/benchmarks/plain_heads.py) doesn't know these options; try --curve"
        )


def output(head: FusionHead, given: Any) -> Tensor:
    return head(given).output


def once(head: FusionHead, way: Callable[[], Tensor], backward: bool) -> None:
    """One pass; with gradients of every parameter and of the features, as between encoders and loss."""
    if backward:
        head.zero_grad()
        way().sum().backward()
    else:
        with torch.no_grad():
            way()


def forget_gradients(head: FusionHead, given: Any) -> None:
    """So that every pass that is measured has all of them to make."""
    head.zero_grad()
    for found in given.values():
        for f in found if isinstance(found, list) else [found]:
            f.tokens.grad = f.pooled.grad = None


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def made(name: str, counts: dict[str, int], batch: int, width: int, options: dict[str, Any]) -> tuple[FusionHead, Any]:
    """A head with its own defaults but for these options, and features of so many tokens a modality for it."""
    torch.manual_seed(0)
    levels = LEVELS if HEADS[name].stage == "levels" else 0
    make: Any = HEADS[name]
    head = make({m: [width] * levels or width for m in counts}, CLASSES, **options).to(device())
    given = {m: features(batch, count, width) for m, count in counts.items()}
    return head, {m: [f] * levels or f for m, f in given.items()}


def features(batch: int, count: int, width: int) -> Features:
    """Random features that want a gradient; the last quarter of each sample's tokens is padding for every other sample."""
    mask = torch.ones(batch, count, dtype=torch.bool, device=device())
    mask[::2, count - count // 4 :] = False
    tokens = torch.randn(batch, count, width, device=device(), requires_grad=True)
    return Features(tokens, mask, torch.randn(batch, width, device=device(), requires_grad=True))


def taking_turns(ways: list[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Seconds of each way, round by round, the order reversed every other round; each round lasts a hundredth of a second or more."""
    repeats = []
    for way in ways:
        way()
        repeats.append(max(1, int(0.02 / seconds(way, 1))))
    found: list[list[float]] = [[] for _ in ways]
    for turn in range(rounds):
        for place in range(len(ways))[:: 1 if turn % 2 else -1]:
            found[place].append(seconds(ways[place], max(repeats)))
    return found


def seconds(way: Callable[[], None], repeats: int) -> float:
    """Of one repeat."""
    settle()
    began = time.perf_counter()
    for _ in range(repeats):
        way()
    settle()
    return (time.perf_counter() - began) / repeats


def settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(way: Callable[[], None], forget: Callable[[], None] = lambda: None) -> int:
    """The most memory that tensors made in one pass hold at once; what `forget` frees is freed before."""
    forget()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler remarks on missing GPUs
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        way()
    held = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most
