"""fusion shrink --method=prune and --method=sparse: a pruned run, trained on by the recipe of its source."""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion.cli.options import Options, above_zero
from fusion.console import aligned, is_rank_zero
from fusion.deploy.comparison import compare_runs, ratios, table
from fusion.deploy.pruning.fine_tuning import EPOCHS, RATE, check_training, fine_tune
from fusion.deploy.pruning.source import check_free
from fusion.deploy.pruning.sparse import sparsify
from fusion.deploy.pruning.structured import SAMPLES, Pruned, prune
from fusion.deploy.shrinking import REPORT, has_split
from fusion.errors import UserError
from fusion.predictor import Predictor, model_of
from fusion.runs.bundle import MODEL, is_bundle
from fusion.settings.reading import reading_options

START = "start"  # folder of the untrained model in that of the run
OF_FIT = ("--trainer.", "--data.", "--model.", "--checkpoint.")
HELP = "Options of fit (--data.batch_size=64, --model.teacher.runs=RUN) change how it is trained."


def pruned(arguments: Sequence[str]) -> int:
    """fusion shrink --method=prune; returns the exit status."""
    parser = options_of("prune", "Remove the least important units of a run's model, and train what is left by the run's recipe.")
    parser.add_argument(
        "--keep", type=float, help="share of the units of each group that are kept; 0.6 if neither this nor --times is given"
    )
    parser.add_argument("--times", type=float, help="instead: how many times fewer parameters the model shall have")
    parser.add_argument("--skip", action="append", default=[], help="part or pattern of names that is left as it is; may be repeated")
    parser.add_argument(
        "--by",
        default="variance",
        choices=("variance", "magnitude"),
        help="importance of a unit: what it adds to the output of its block, or its weights alone",
    )
    parser.add_argument("--keep_vocabulary", action="store_true", help="keep embeddings of tokens that no training text has")
    parser.add_argument(
        "--calibration_samples",
        type=above_zero,
        default=SAMPLES,
        help="training samples from which the importance of units and the refitted weights come",
    )
    own, of_fit = own_and_fit(arguments)
    options = parser.parse_args(own)

    def make(start: Path) -> tuple[dict[str, Any], str]:
        made = prune(
            options.run,
            start,
            keep=options.keep,
            times=options.times,
            vocabulary=not options.keep_vocabulary,
            skip=options.skip,
            by=options.by,
            samples=options.calibration_samples,
            checkpoint=options.checkpoint,
        )
        print(removed_lines(made))
        return made.plain(), made.note

    return shrink_by(make, options, of_fit)


def sparse(arguments: Sequence[str]) -> int:
    """fusion shrink --method=sparse; returns the exit status."""
    parser = options_of("sparse", "Set the smallest weights of a run's model to zero, and train the others by the run's recipe.")
    parser.add_argument(
        "--share", type=float, default=0.5, help="share of the weights of linear layers and convolutions that are set to zero"
    )
    own, of_fit = own_and_fit(arguments)
    options = parser.parse_args(own)

    def make(start: Path) -> tuple[dict[str, Any], str]:
        made = sparsify(options.run, start, share=options.share, checkpoint=options.checkpoint)
        lines = [[f"{part}:", f"{zeros:,}", "of", f"{total:,} weights are zero"] for part, (total, zeros) in made.by_part.items()]
        print(aligned(lines))
        print("This makes nothing faster by itself, and the file no smaller: it is for runtimes that skip zeros, and compressed files.")
        return {"share": options.share, "zeros": {part: list(both) for part, both in made.by_part.items()}}, made.note

    return shrink_by(make, options, of_fit)


def options_of(method: str, description: str) -> Options:
    parser = Options("fusion shrink", f"{description} Print size, latency and scores before and after. {HELP}")
    parser.add_argument("--run", required=True, help="run folder printed by fit")
    parser.add_argument("--method", required=True, choices=(method,), help="the options of each method differ")
    parser.add_argument("--out", required=True, help="folder of the new run")
    parser.add_argument("--checkpoint", default="best", help="best or last, of the run")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of training what is left; 0: none")
    parser.add_argument("--rate", type=float, default=RATE, help="learning rate, relative to the recipe's")
    parser.add_argument("--samples", type=above_zero, default=2000, help="at most this many samples of each split are scored")
    parser.add_argument("--seconds", type=float, default=2.0, help="for which each model is timed, with 1 and with 32 samples each")
    return parser


def own_and_fit(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command's own arguments, and those of fit.

    >>> own_and_fit(["--run", "r", "--data.batch_size", "8", "--trainer.max_steps=5"])
    (['--run', 'r'], ['--data.batch_size', '8', '--trainer.max_steps=5'])
    """
    return reading_options(arguments, OF_FIT)


def shrink_by(make: Callable[[Path], tuple[dict[str, Any], str]], options: Any, of_fit: Sequence[str]) -> int:
    """Makes the smaller model, trains it, and compares it. make: writes it to a folder; returns a report of it, and a note or ""."""
    out, source = Path(options.out).expanduser(), Path(options.run).expanduser()
    if options.epochs < 0:
        raise UserError(f"--epochs is {options.epochs}; expected at least 1, or 0 to not train")
    if not options.epochs and of_fit:
        raise UserError(f"--epochs is 0, so that nothing is trained; leave out {of_fit[0].partition('=')[0]}")
    start = out / START if options.epochs else out
    report: dict[str, Any] = {}
    if is_rank_zero():  # other ranks begin where this one trains
        check_free(out)
        if options.epochs:
            check_training(source, options.rate)
        report, note = make(start)
        if note:
            print(f"note: {note}")
    elif options.epochs:
        await_model(start)
    else:
        return 0
    if options.epochs:
        try:
            status = fine_tune(start, out, epochs=options.epochs, rate=options.rate, options=of_fit)
        except UserError:
            if is_rank_zero() and not (out / "checkpoints").exists():  # nothing is left of a run that didn't begin
                shutil.rmtree(out, ignore_errors=True)
            raise
        if status or not is_rank_zero():
            return status
    runs: dict[str, tuple[Path, str]] = {
        "before": (source, options.checkpoint),
        "without training": (start, "best"),
        "after": (out, "best"),
    }
    if not options.epochs:
        del runs["without training"]
    compare_and_print(runs, out, report | {"method": options.method}, options)
    print(f"\nrun folder  {out}")
    return 0


def await_model(start: Path, timeout_s: float = 1800.0) -> None:
    """Waits until the first rank has written the model that training starts from. Raises UserError if it doesn't."""
    end = time.monotonic() + timeout_s
    while not is_bundle(start / MODEL):
        if time.monotonic() > end:
            raise UserError(f"the first rank has not written {start} within {timeout_s:g} s; see its output")
        time.sleep(0.2)


def compare_and_print(runs: Mapping[str, tuple[Path, str]], out: Path, report: Mapping[str, Any], options: Any) -> None:
    """Prints the table of the models before and after, and writes it and the report to shrink.json; without the table where a model of this
    task can't be measured, which is said."""
    models: dict[str, Any] = {}
    try:
        splits = [split for split in ("val", "test") if has_split(out, split)]
        compared = compare_runs(runs, splits, samples=options.samples, seconds=options.seconds)
        score = Predictor.from_file(model_of(out, "best")[0], device="cpu").processor.task.monitor
        print(f"\n{table(compared, score)}\n")
        print("\n".join(ratios(compared, "before", "after")))
        models = {name: one.plain() for name, one in compared.items()}
    except UserError as error:
        print(f"note: there is no table of latency and scores: {error}")
    (out / REPORT).write_text(json.dumps({**report, "models": models}, indent=2) + "\n", encoding="utf-8")


def removed_lines(made: Pruned) -> str:
    """What was removed, by part of the model, and what wasn't."""
    lines = [[f"{one.part}:", one.kind, f"{one.before:,}", f"to {one.after:,}"] for one in made.removed]
    untouched = [f"{part} is left as it is: {reason}" for part, reason in made.untouched.items()]
    (before, after), (bytes_before, bytes_after) = made.parameters, made.bytes
    total = (
        f"{before:,} parameters to {after:,}: {before / after:.2f} times fewer; {bytes_before / 2**20:.1f} to {bytes_after / 2**20:.1f} MiB"
    )
    return "\n".join([aligned(lines), *untouched, total])
