"""A training from its settings to a scored run folder: what the command and the Python door do."""

import json
import logging
import math
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import transformers
from huggingface_hub.utils import disable_progress_bars
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from fusion.console import aligned, figure, is_rank_zero, print_rank_zero, printing, signs_of_life
from fusion.data import FusionData
from fusion.data.table import Table
from fusion.errors import INTERRUPTED, LOST_RANK, REQUEUE, UserError
from fusion.evaluation.bounds import bounds, repeated
from fusion.exit import leave
from fusion.predictor import model_of
from fusion.runs.bundle import MODEL, of_checkpoint, write_bundle
from fusion.runs.checkpoint_files import newest_whole, read_checkpoint
from fusion.settings.parser import FusionCLI, words
from fusion.settings.resume import has_checkpoint, refuse_difference, refuse_other_data, refuse_past_end, resumed_run, to_go_on_from
from fusion.tasks import Task
from fusion.training import Engine
from fusion.training.callbacks.checkpoints import BestAndLast
from fusion.training.callbacks.guards import Guard
from fusion.training.callbacks.plan import Plan
from fusion.training.callbacks.progress import EpochLines
from fusion.training.callbacks.run_folder import METRICS, RunFolder, new_run_folder, read_metrics
from fusion.training.callbacks.signals import AgreeFirst, Interrupted, SaveInTime, SeedEachStep
from fusion.training.checks import check_before_training, validates
from fusion.training.distributed.lost_ranks import lost_a_rank
from fusion.training.weights import load_weights


class Outcome(NamedTuple):
    """How a training ended: with the status of its command, in which run folder (None on other ranks than the first), and what was said."""

    status: int
    folder: Path | None
    message: str = ""


def fit(arguments: Sequence[str]) -> int:
    """The command; gives its exit status."""
    with printing():
        return train(arguments).status


def train(arguments: Sequence[str]) -> Outcome:
    """Train as the command's arguments say, or go on with a run, and score it. Raises UserError for what can't be meant."""
    quiet()
    cli, resumed = settled(arguments)
    recipe = cli.resolved()
    if cli.config.init_from == "":
        raise UserError("--init_from is empty; expected a file of weights, or leave it out")
    if cli.config.trainer.enable_checkpointing is False:
        raise UserError("trainer.enable_checkpointing is false: a run is scored, used and continued by its checkpoints; leave it out")
    seed_everything(cli.config.seed_everything, workers=True)
    choose_kernels(cli.config.float32_matmul_precision)
    checkpoint = BestAndLast(cli.config.checkpoint.every_updates, cli.config.checkpoint.every_minutes)
    folder = None
    if is_rank_zero():
        folder = resumed or new_run_folder(Path(cli.config.runs), run_name(arguments))
    run = RunFolder(folder, recipe, checkpoint, log=cli.config.trainer.logger is None)
    try:
        start, warning = newest_whole(resumed / "checkpoints") if resumed is not None else (None, None)
        if warning:
            print_rank_zero(warning)
        if resumed is not None and start is not None:
            held = to_go_on_from(start)
            refuse_difference(recipe, held.get("recipe", recipe), fix=f"Restore them in {resumed / 'recipe.yaml'}")
            refuse_past_end(held, cli.config.trainer.max_epochs, cli.config.trainer.max_steps)
        model, data, trainer = cli.make([Plan(), *standing_callbacks(run, cli.config.seed_everything), checkpoint])
        with signs_of_life("loading data and encoders"):
            model.build(data)
        checkpoint.monitor_of(model.task.monitor, model.task.mode)
        if not validates(trainer, data.splits):
            checkpoint.without_validation()
        check_before_training(trainer, model, data)
        if resumed is not None and start is not None:
            refuse_other_data(resumed, start, held["fusion"], data)
        print_data_notes(data)
        if resumed is None and cli.config.init_from:
            file = Path(cli.config.init_from).expanduser()
            if file.is_dir():
                file, note = model_of(file, "best")
                if note:
                    print_rank_zero(f"note: {note}")
            print_rank_zero(load_weights(model.model, file, data.processor))
    except BaseException:
        if folder is not None and resumed is None:
            folder.rmdir()
        raise
    if folder is not None:
        shutil.rmtree(folder / MODEL, ignore_errors=True)  # of a run that goes on: what it holds is in best.ckpt
    try:
        trainer.fit(model, datamodule=data, ckpt_path=str(start) if start else None, weights_only=True)
        finish(trainer, model, data, checkpoint, run)
    except Interrupted as stopped:
        return said(stopped.status, run, f"Interrupted after {model.updates:,} updates and saved. To go on:\n  {go_on(run)}")
    except SystemExit as stopped:  # how Lightning ends at a signal that comes outside training, as while the best checkpoint is scored
        status = REQUEUE if isinstance(stopped, SIGTERMException) else INTERRUPTED
        ended = said(status, run, f"Interrupted. From its last checkpoint the run goes on by:\n  {go_on(run)}")
        if dist.is_initialized():  # the other ranks may know nothing of it
            leave(status, together=False)
        return ended
    except MisconfigurationException as error:  # Lightning's own UserError
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error
    except RuntimeError as error:
        if str(error).startswith("Early stopping conditioned on metric"):
            raise UserError(f"trainer.callbacks: {error}") from error
        if not lost_a_rank(error):
            raise
        lost = f"rank {trainer.global_rank} {'lost' if dist.is_initialized() else 'could not reach'} another rank"
        then = "Before its first checkpoint: start the run anew"
        if run.folder is not None and has_checkpoint(run.folder):
            then = f"From its last checkpoint the run goes on by:\n  {go_on(run)}"
        message = f"{lost} ({str(error).splitlines()[0]}). {then}"
        print(f"error: {message}", file=sys.stderr)
        return Outcome(LOST_RANK, run.folder, message)
    return Outcome(0, run.folder)


def said(status: int, run: RunFolder, message: str) -> Outcome:
    print_rank_zero(f"\n{message}")
    return Outcome(status, run.folder, message)


def go_on(run: RunFolder) -> str:
    return f"{command('fit')} --resume {run.folder}"


def settled(arguments: Sequence[str]) -> tuple[FusionCLI, Path | None]:
    """The settings, and the run folder that they continue, if any. Raises UserError for what can't be meant."""
    resumed = resumed_run(arguments)
    if resumed is not None:
        others = [word for is_value, word in words(arguments, "--resume") if not is_value]
        arguments = ["--config", str(resumed / "recipe.yaml"), *others]
    if not arguments:
        raise UserError(
            "say what to train: --recipe quickstart, or --recipe own --data.manifest=FILE.csv; fusion fit --help tells the options"
        )
    cli = FusionCLI(arguments)
    if resumed is not None:
        refuse_difference(cli.resolved(), (resumed / "recipe.yaml").read_text(encoding="utf-8"), others)
    return cli, resumed


def standing_callbacks(run: RunFolder, seed: int) -> list[Callback]:
    """What every run has, whatever its recipe."""
    save = SaveInTime()
    return [run, EpochLines(), SeedEachStep(seed), AgreeFirst(save), Guard(run), save]


def choose_kernels(float32_matmul_precision: str) -> None:
    """Of CUDA, for the process."""
    torch.set_float32_matmul_precision(float32_matmul_precision)
    torch.backends.cudnn.allow_tf32 = float32_matmul_precision != "highest"  # of convolutions, which torch leaves apart
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each (batch, length), and texts have many lengths


def print_data_notes(data: FusionData) -> None:
    """What the data's preparer says of it, what was dropped and what was noted."""
    if data.card:
        print_rank_zero(data.card)
    if data.ledger.issues:
        print_rank_zero(f"warning: {data.ledger.summary()}")
    for note in data.ledger.notes:
        print_rank_zero(f"note: {note}")


def finish(trainer: Trainer, model: Engine, data: FusionData, checkpoint: ModelCheckpoint, run: RunFolder) -> None:
    """Score the best checkpoint on the test split; print and keep the result."""
    best = checkpoint.best_model_path or checkpoint.last_model_path or None  # None: of a run without a single update
    updates = model.updates  # which the best checkpoint sets back
    scores: dict[str, float] = {}
    lines: list[list[str]] = []
    if "test" in data.splits:
        trainer.test(model, datamodule=data, ckpt_path=best, verbose=False, weights_only=True)
        scores = {name.removeprefix("test/"): float(value) for name, value in trainer.callback_metrics.items() if name.startswith("test/")}
    if scores:  # not with trainer.limit_test_batches=0
        table = data.splits["test"].table
        task = model.task
        best_alone = telling_bounds(task, table, model.modalities)
        scores |= {f"{'ceiling' if task.mode == 'max' else 'floor'}_{name}": bound for name, bound in best_alone.items()}
        at_a_time = trainer.test_dataloaders[0].batch_sampler.batch_size * trainer.world_size  # type: ignore[index]
        scored = min(len(table), trainer.num_test_batches[0] * at_a_time)  # fewer by trainer.limit_test_batches
        of_all = f"{len(table):,}" if scored < len(table) else ""
        lines = [
            ["test", *task.headline, "samples"],
            ["this model", *(figure(scores[name]) for name in task.headline.values()), f"{scored:,}"],
        ]
        for name, bound in best_alone.items():
            cells = [figure(bound) if score == task.bounded else "" for score in task.headline.values()]
            lines.append([title_of(task, name), *cells, of_all])
    if trainer.is_global_zero and run.folder is not None:
        rates = [round(rate, 1) for lines in trainer.callbacks if isinstance(lines, EpochLines) for rate in lines.rates]  # type: ignore[attr-defined]
        results = {"test": finite(scores), "val": validated(run.folder, model.task), "updates": updates, "samples_per_s": rates}
        (run.folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if best is not None and trainer.is_global_zero and run.folder is not None:
        write_bundle(run.folder / MODEL, *of_checkpoint(read_checkpoint(best), Path(best)))
    print_rank_zero("\n" + aligned(lines) if lines else "\nno test samples: nothing scored")
    print_rank_zero(f"\nrun folder  {run.folder}")
    if best is None:
        print_rank_zero("no update was made, and no checkpoint: this model can't be used")
        return
    print_rank_zero(f"score it    {command('evaluate')} --run {run.folder}")
    print_rank_zero(f"use it      {command('predict')} --run {run.folder} --manifest FILE")


INFORMATIVE = 0.5  # least share of samples whose input repeats; where it doesn't, a bound counts nothing


def telling_bounds(task: Task, table: Table, modalities: Sequence[str]) -> dict[str, float]:
    """The bounds that say something of these samples: of each modality that the model reads, if it mostly repeats; and of one answer for
    all."""
    inputs = {name: [table.kinds[name].identity(cell) for cell in table.inputs[name]] for name in modalities}
    found = bounds(task, {name: seen for name, seen in inputs.items() if repeated(seen) >= INFORMATIVE}, table.labels)
    of_all = found.pop(task.baseline)
    return {**found, task.baseline: of_all}


def title_of(task: Task, bound: str) -> str:
    """What a bound is called in the table of results."""
    if bound == task.baseline:
        return "majority class" if task.one_of_classes else f"{bound} for all"
    return f"{'upper' if task.mode == 'max' else 'lower'} bound ({bound} only)"


def validated(folder: Path, task: Task) -> dict[str, float]:
    """The scores of the best validation, as they were logged; none where nothing was."""
    path, monitor = folder / METRICS, f"val/{task.monitor}"
    rows = [row for row in read_metrics(path) if monitor in row] if path.is_file() else []
    if not rows:
        return {}
    best = (max if task.mode == "max" else min)(rows, key=lambda row: float(row[monitor]))
    return finite({name.removeprefix("val/"): float(value) for name, value in best.items() if name.startswith("val/")})


def finite(scores: Mapping[str, float]) -> dict[str, float]:
    """Those that the samples define; JSON has no NaN."""
    return {name: value for name, value in scores.items() if math.isfinite(value)}


# What is said, and how.


def run_name(arguments: Sequence[str]) -> str:
    """The name of the first recipe on the line, else "fit"."""
    return next((Path(word).stem for is_value, word in words(arguments, "--recipe") if is_value), "fit")


FIT_COMMAND = "FUSION_FIT_COMMAND"  # set by what starts fit in its own way, and is to be used again to go on


def command(name: str) -> str:
    """How this program was called, for another of its commands."""
    if name == "fit" and FIT_COMMAND in os.environ:
        return os.environ[FIT_COMMAND]
    script = Path(sys.argv[0])
    if script.name == "__main__.py":
        return f"python -m fusion {name}"
    return f"python {shlex.quote(str(script.with_name(f'{name}.py')))}" if script.suffix == ".py" else f"fusion {name}"


def quiet() -> None:
    """Keep back what is said on every run and concerns nobody."""
    for pattern in (
        ".*You're resuming from a checkpoint that ended before the epoch ended.*",  # our batches do begin where they stopped
        ".*does not have many workers.*",  # images kept in memory need none
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*It is recommended to use `self.log.*sync_dist=True.*",  # the metrics are already summed over the ranks
        ".*smaller than the logging interval.*",
        ".*LeafSpec.*",
        ".*WeightAveraging callback with a model that overrides the configure_model.*",  # which shards, and only where asked to
        ".*module\\(s\\) in eval mode at the start of training.*",  # what is frozen is
        ".*Experiment logs directory .* exists and is not empty.*",  # RunFolder made it
    ):
        warnings.filterwarnings("ignore", message=pattern)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.disable_progress_bar()  # of weights that are loaded in a second
    if not sys.stderr.isatty():
        disable_progress_bars()  # of downloads, which a log would hold in a thousand lines
