"""fusion benchmark: what the training loop, heads, activations and ranks cost, and whether a run survives being killed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion.benchmarks.gpu import benchmark_gpu
from fusion.benchmarks.heads import benchmark_heads, curve
from fusion.benchmarks.kills import benchmark_kills
from fusion.benchmarks.memory import benchmark_memory
from fusion.benchmarks.overhead import benchmark_overhead
from fusion.benchmarks.pretrained import benchmark_pretrained
from fusion.benchmarks.ranks import benchmark_ranks
from fusion.benchmarks.table import benchmark_table
from fusion.cli.options import Options
from fusion.errors import UserError, nearest
from fusion.heads import available

BENCHMARKS = ("overhead", "heads", "kills", "ranks", "memory", "pretrained", "table", "gpu")


def benchmark(arguments: Sequence[str]) -> int:
    """Run the command; gives the exit status."""
    words = list(arguments)
    if not words or words[0] in ("-h", "--help"):
        print(
            "usage: fusion benchmark overhead [--rounds N] [--updates N] --recipe NAME [any option of fit]\n"
            "       fusion benchmark heads [--heads PATTERN] [--rounds N] [--batch N] [--text N] [--image N] [--width N]\n"
            "                              [--options JSON] [--curve]\n"
            "       fusion benchmark kills [--kills N] [--seed N] --recipe NAME [any option of fit]\n"
            "       fusion benchmark ranks [--ranks N] [--rounds N] [--compress fp16 sign] [--csv FILE]\n"
            "                              --recipe NAME [any option of fit]\n"
            "       fusion benchmark memory [--rounds N] --recipe NAME [any option of fit]\n"
            "       fusion benchmark pretrained [--heads PATTERN] [--seeds N] [--shares 400 2000 all] [--csv FILE]\n"
            "                                   --recipe NAME [any option of fit]\n"
            "       fusion benchmark table [--rows N] [--rounds N]\n"
            "       fusion benchmark gpu [--scenes N]\n\n"
            "overhead: samples per second of the whole fit loop, of a bare PyTorch loop fed by the same loader, and of a bare loop\n"
            "over batches that already sit in memory; same model, same optimiser, taken in turns in one process.\n"
            "heads: parameters, time and peak memory of each head, beside the plainest PyTorch of its formula, taken in turns;\n"
            "with --curve, how time and memory grow from 512 to 8,192 text tokens; --options: of the heads, as JSON.\n"
            "kills: a run killed (SIGKILL) at random moments and resumed each time, compared with one that nobody disturbed.\n"
            "ranks: one process, accumulation, and several processes of one core each with every compression: speed, bytes sent, losses\n"
            "and scores beside each other; --csv: the loss of every update.\n"
            "memory: peak memory and time of a training batch, the activations of each part kept or computed again.\n"
            "pretrained: validation and test accuracy of every head on shares of the training samples, over the seeds;\n"
            "--csv: a line a run, and the runs that it has already are not made again.\n"
            "table: time and memory of reading a large CSV manifest, beside pyarrow's reader alone.\n"
            "gpu: checks and figures of this machine's GPUs on a page, in under ten minutes; without one, the half that needs none."
        )
        return 0
    if words[0] not in BENCHMARKS:
        raise UserError(f"unknown benchmark '{words[0]}'. {nearest(words[0], BENCHMARKS)}")
    if words[0] == "heads":
        return heads(words[1:])
    if words[0] == "gpu":
        return benchmark_gpu(own_options_alone(words, scenes=600).scenes)
    if words[0] == "table":
        asked = own_options_alone(words, rows=1_000_000, rounds=5)
        return benchmark_table(asked.rows, asked.rounds)
    if words[0] == "kills":
        asked, rest = own_options(words, kills=20, seed=0)
        return benchmark_kills(rest, asked.kills, asked.seed)
    if words[0] == "memory":
        asked, rest = own_options(words, rounds=5)
        return benchmark_memory(rest, asked.rounds)
    if words[0] == "pretrained":
        asked, rest = own_options(words, heads="*", seeds=3, shares=["400", "2000", "all"], csv=None)
        return benchmark_pretrained(rest, asked.heads, asked.seeds, asked.shares, asked.csv and Path(asked.csv))
    if words[0] == "ranks":
        asked, rest = own_options(words, ranks=2, rounds=1, compress=["fp16", "sign"], csv=None)
        return benchmark_ranks(rest, asked.ranks, asked.rounds, asked.compress, asked.csv and Path(asked.csv))
    asked, rest = own_options(words, rounds=5, updates=40)
    return benchmark_overhead(rest, asked.rounds, asked.updates)


def own_options(words: Sequence[str], **defaults: Any) -> tuple[Any, list[str]]:
    """The values of a benchmark's own options, and the words that are fit's."""
    options = Options(f"fusion benchmark {words[0]}", "")
    for name, default in defaults.items():
        if isinstance(default, list):
            options.add_argument(f"--{name}", nargs="*", default=default)
        else:
            options.add_argument(f"--{name}", type=int if isinstance(default, int) else str, default=default)
    return options.parse_known_args(words[1:])


def own_options_alone(words: Sequence[str], **defaults: Any) -> Any:
    """The same of a benchmark that takes none of fit's. Raises UserError for others."""
    asked, unknown = own_options(words, **defaults)
    if unknown:
        known = ", ".join(f"--{name}" for name in defaults)
        raise UserError(f"fusion benchmark {words[0]}: unknown option {unknown[0]}. Known: {known}.")
    return asked


def heads(arguments: Sequence[str]) -> int:
    """Print the costs of the heads that match a pattern."""
    options = Options("fusion benchmark heads", "")
    options.add_argument("--heads", default="*")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--text", type=int, default=64)
    options.add_argument("--image", type=int, default=196)
    options.add_argument("--width", type=int, default=384)
    options.add_argument("--options", type=json.loads, default={})
    options.add_argument("--curve", action="store_true")
    asked = options.parse_args(list(arguments))
    if not available(asked.heads):
        raise UserError(f"no head matches '{asked.heads}'. {nearest(asked.heads, available())}")
    sizes = {"batch": asked.batch, "image": asked.image, "width": asked.width, "rounds": asked.rounds, "options": asked.options}
    try:
        if asked.curve:
            curve(asked.heads, **sizes)
        else:
            benchmark_heads(asked.heads, text=asked.text, **sizes)
    except TypeError as error:
        if not asked.options:
            raise
        raise UserError(f"--options={json.dumps(asked.options)}: {error}") from error
    return 0
