"""fusion benchmark: cost of the training loop, heads, activation memory and ranks; recovery from kills."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion.benchmarks.distilled import benchmark_distilled
from fusion.benchmarks.gpu import benchmark_gpu
from fusion.benchmarks.heads import benchmark_heads, curve
from fusion.benchmarks.kills import benchmark_kills
from fusion.benchmarks.memory import benchmark_memory
from fusion.benchmarks.overhead import benchmark_overhead
from fusion.benchmarks.packages import benchmark_packages
from fusion.benchmarks.pretrained import benchmark_pretrained
from fusion.benchmarks.ranks import benchmark_ranks
from fusion.benchmarks.retrieval import benchmark_retrieval
from fusion.benchmarks.serving import Setting, benchmark_serving
from fusion.benchmarks.table import benchmark_table
from fusion.cli.options import Options
from fusion.errors import UserError, nearest
from fusion.heads import available
from fusion.packages.folder import is_package

BENCHMARKS = ("overhead", "heads", "kills", "ranks", "memory", "pretrained", "table", "retrieval", "distilled", "packages", "serve", "gpu")


def benchmark(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
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
            "       fusion benchmark retrieval [--pairs N] [--chunk N] [--rounds N] --recipe NAME [any option of fit]\n"
            "       fusion benchmark distilled [--seeds N] [--first_seed N] [--teachers N] [--teacher OPTIONS | --given RUN ...]\n"
            "                                  --recipe NAME [any option of fit]\n"
            "       fusion benchmark packages --run RUN [--seconds N]\n"
            "       fusion benchmark serve --run RUN_OR_PACKAGE [--against litserve] [--seconds N] [--rounds N] [--connections N]\n"
            "                              [--batch_size N] [--pixels N] [--parallel_batches N] [--threads N]\n"
            "       fusion benchmark gpu [--scenes N]\n\n"
            "overhead: samples per second of the whole fit loop, of a bare PyTorch loop fed by the same loader, and of a bare loop\n"
            "over batches already in memory; same model and optimiser, alternating in one process.\n"
            "heads: parameters, time and peak memory of each head, compared with a plain PyTorch implementation, alternating;\n"
            "with --curve, how time and memory grow from 512 to 8,192 text tokens; --options: the heads' arguments, as JSON.\n"
            "kills: a run killed (SIGKILL) at random moments and resumed each time, compared with an undisturbed run.\n"
            "ranks: compares one process, accumulation, and several processes of one core each with every compression: speed, bytes sent,\n"
            "losses and scores; --csv: file for the loss of every update.\n"
            "memory: peak memory and time of a training batch, with the activations of each part stored or recomputed.\n"
            "pretrained: validation and test accuracy of every head on fractions of the training samples, over several seeds;\n"
            "--csv: file to which each run adds a line; runs already in it are not repeated.\n"
            "table: time and memory of reading a large CSV manifest, compared with pyarrow's reader alone.\n"
            "retrieval: time and memory of a contrastive update in accumulated batches, compared with all pairs at once and with one\n"
            "such batch; and of ranking 5,000 images and 25,000 captions.\n"
            "distilled: validation and test scores of a model trained alone and by a teacher (model.teacher), over several seeds, with\n"
            "the interval of the difference; --teacher: the options of fit in which the teachers differ from it, as one argument;\n"
            "--teachers: how many, whose probabilities are averaged; --given: finished runs instead.\n"
            "packages: latency and peak memory of a run's packages (onnx, torch, aot), beside PyTorch and torch.compile, in turns.\n"
            "serve: requests per second and latency of fusion serve, compared with another server of the same model and with the model's\n"
            "own batched throughput, the load generator on the same cores; --pixels: size of the pictures, by default the model's.\n"
            "gpu: one page of checks and measurements of this machine's GPUs, in under ten minutes; without one, those that need none."
        )
        return 0
    if words[0] not in BENCHMARKS:
        raise UserError(f"unknown benchmark '{words[0]}'. {nearest(words[0], BENCHMARKS)}")
    if words[0] == "heads":
        return heads(words[1:])
    if words[0] == "gpu":
        return benchmark_gpu(own_options_alone(words, scenes=600).scenes)
    if words[0] == "packages":
        options = own_options_alone(words, run="", seconds=4)
        if not options.run:
            raise UserError("fusion benchmark packages: expected --run RUN")
        return benchmark_packages(Path(options.run).expanduser(), options.seconds)
    if words[0] == "table":
        options = own_options_alone(words, rows=1_000_000, rounds=5)
        return benchmark_table(options.rows, options.rounds)
    if words[0] == "serve":
        return serving(words)
    if words[0] == "kills":
        options, rest = own_options(words, kills=20, seed=0)
        return benchmark_kills(rest, options.kills, options.seed)
    if words[0] == "memory":
        options, rest = own_options(words, rounds=5)
        return benchmark_memory(rest, options.rounds)
    if words[0] == "retrieval":
        options, rest = own_options(words, pairs=4096, chunk=256, rounds=3)
        return benchmark_retrieval(rest, options.pairs, options.chunk, options.rounds)
    if words[0] == "pretrained":
        options, rest = own_options(words, heads="*", seeds=3, shares=["400", "2000", "all"], csv=None)
        return benchmark_pretrained(rest, options.heads, options.seeds, options.shares, options.csv and Path(options.csv))
    if words[0] == "distilled":
        options, rest = own_options(words, seeds=6, first_seed=0, teachers=1, teacher="", given=[])
        return benchmark_distilled(rest, options.seeds, options.teachers, options.teacher, options.given, options.first_seed)
    if words[0] == "ranks":
        options, rest = own_options(words, ranks=2, rounds=1, compress=["fp16", "sign"], csv=None)
        return benchmark_ranks(rest, options.ranks, options.rounds, options.compress, options.csv and Path(options.csv))
    options, rest = own_options(words, rounds=5, updates=40)
    return benchmark_overhead(rest, options.rounds, options.updates)


def own_options(words: Sequence[str], **defaults: Any) -> tuple[Any, list[str]]:
    """The values of a benchmark's own options, and the remaining arguments, which are passed to fit."""
    parser = Options(f"fusion benchmark {words[0]}", "")
    for name, default in defaults.items():
        if isinstance(default, list):
            parser.add_argument(f"--{name}", nargs="*", default=default)
        else:
            parser.add_argument(f"--{name}", type=int if isinstance(default, int) else str, default=default)
    return parser.parse_known_args(words[1:])


def own_options_alone(words: Sequence[str], **defaults: Any) -> Any:
    """The same for a benchmark that takes no options of fit. Raises UserError for unknown options."""
    options, unknown = own_options(words, **defaults)
    if unknown:
        known = ", ".join(f"--{name}" for name in defaults)
        raise UserError(f"fusion benchmark {words[0]}: unknown option {unknown[0]}. Known: {known}.")
    return options


def serving(words: Sequence[str]) -> int:
    """Measure the server."""
    from fusion.deploy.serve.model import concurrency, has_gpu

    numbers: dict[str, Any] = {"seconds": 20, "rounds": 3, "connections": 64, "batch_size": 32, "pixels": 0}
    numbers |= {"parallel_batches": 0, "threads": 0}
    options = own_options_alone(words, run="", against=None, **numbers)
    if not options.run:
        raise UserError("fusion benchmark serve: --run is missing; expected a run or a package")
    for name in ("seconds", "rounds", "connections", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}; expected at least 1")
    path = Path(options.run).expanduser().resolve()
    spread = concurrency(options.parallel_batches or None, options.threads or None, gpu=not is_package(path) and has_gpu())
    sizes = (options.seconds, options.rounds, options.connections, options.batch_size, options.pixels or None)
    return benchmark_serving(Setting(path, *sizes, spread.runs, spread.threads), options.against)


def heads(arguments: Sequence[str]) -> int:
    """Print the costs of the heads that match a pattern."""
    parser = Options("fusion benchmark heads", "")
    parser.add_argument("--heads", default="*")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--text", type=int, default=64)
    parser.add_argument("--image", type=int, default=196)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--curve", action="store_true")
    options = parser.parse_args(list(arguments))
    if not available(options.heads):
        raise UserError(f"no head matches '{options.heads}'. {nearest(options.heads, available())}")
    sizes = {"batch": options.batch, "image": options.image, "width": options.width, "rounds": options.rounds, "options": options.options}
    try:
        if options.curve:
            curve(options.heads, **sizes)
        else:
            benchmark_heads(options.heads, text=options.text, **sizes)
    except TypeError as error:
        if not options.options:
            raise
        raise UserError(f"--options={json.dumps(options.options)}: {error}") from error
    return 0
