"""One training, from its settings to a scored run folder; used by the command line and the Python API."""

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

from fusion.console import aligned, figure, heartbeat, is_rank_zero, print_rank_zero, printing
from fusion.data import FusionData
from fusion.data.table import Table
from fusion.errors import INTERRUPTED, LOST_RANK, REQUEUE, UserError
from fusion.evaluation.bounds import bound_title, bounds, repeated
from fusion.exit import leave
from fusion.predictor import model_of
from fusion.runs.bundle import MODEL, of_checkpoint, write_bundle
from fusion.runs.checkpoint_files import newest_intact, read_checkpoint
from fusion.settings.parser import FusionCLI, words
from fusion.settings.resume import (
    has_checkpoint,
    load_checkpoint,
    reject_data_changes,
    reject_end_in_the_past,
    reject_recipe_changes,
    resumed_run,
)
from fusion.tasks import Task
from fusion.training import Engine
from fusion.training.callbacks.checkpoints import BestAndLast
from fusion.training.callbacks.guards import Guard
from fusion.training.callbacks.plan import Plan
from fusion.training.callbacks.progress import EpochLines
from fusion.training.callbacks.run_folder import METRICS, RunFolder, new_run_folder, read_metrics
from fusion.training.callbacks.signals import AgreeFirst, Interrupted, SaveInTime, SeedEachStep
from fusion.training.checks import check_before_training, validates
from fusion.training.distillation import report_line
from fusion.training.distributed.lost_ranks import lost_a_rank
from fusion.training.mixing import report, shares
from fusion.training.weights import load_weights


class Outcome(NamedTuple):
    """How a training ended: exit status, run folder (None on other ranks than the first) and printed message."""

    status: int
    folder: Path | None
    message: str = ""


def fit(arguments: Sequence[str]) -> int:
    """The command `fusion fit`; returns its exit status."""
    with printing():
        return train(arguments).status


def train(arguments: Sequence[str], folder: Path | None = None) -> Outcome:
    """Train or resume a run as the command's arguments say, and score it. Raises UserError for invalid settings.

    folder: of a new run, which exists; None: a new one in the folder of runs.
    """
    silence_harmless_warnings()
    cli, resumed = parse_settings(arguments)
    recipe = cli.resolved()
    if cli.config.init_from == "":
        raise UserError("--init_from is empty; expected a file of weights, or leave it out")
    if cli.config.trainer.enable_checkpointing is False:
        raise UserError("trainer.enable_checkpointing is false: a run needs checkpoints to be scored, used and resumed; leave it out")
    seed_everything(cli.config.seed_everything, workers=True)
    choose_kernels(cli.config.float32_matmul_precision)
    checkpoint = BestAndLast(cli.config.checkpoint.every_updates, cli.config.checkpoint.every_minutes)
    given, folder = folder, None
    if is_rank_zero():
        folder = resumed or given or new_run_folder(Path(cli.config.runs), run_name(arguments))
    run = RunFolder(folder, recipe, checkpoint, log=cli.config.trainer.logger is None)
    try:
        start, warning = newest_intact(resumed / "checkpoints") if resumed is not None else (None, None)
        if warning:
            print_rank_zero(warning)
        if resumed is not None and start is not None:
            state = load_checkpoint(start)
            reject_recipe_changes(recipe, state.get("recipe", recipe), fix=f"Restore them in {resumed / 'recipe.yaml'}")
            reject_end_in_the_past(state, cli.config.trainer.max_epochs, cli.config.trainer.max_steps)
        model, data, trainer = cli.make([Plan(), *standing_callbacks(run, cli.config.seed_everything), checkpoint])
        if cli.config.monitor:
            model.task.monitor = monitored(cli.config.monitor)
        with heartbeat("loading data and encoders"):
            model.build(data)
        checkpoint.monitor_of(model.task.monitor, model.task.mode)
        if not validates(trainer, data.splits):
            checkpoint.without_validation()
        check_before_training(trainer, model, data)
        with heartbeat("computing the teacher's outputs"):
            model.ask_teacher(data)
        if resumed is not None and start is not None:
            reject_data_changes(resumed, start, state["fusion"], data)
        print_data_notes(data)
        if resumed is None and cli.config.init_from:
            file = Path(cli.config.init_from).expanduser()
            if file.is_dir():
                file, note = model_of(file, "best")
                if note:
                    print_rank_zero(f"note: {note}")
            print_rank_zero(load_weights(model.model, file, data.processor))
    except BaseException:
        if folder is not None and resumed is None and given is None:
            folder.rmdir()
        raise
    if folder is not None:
        shutil.rmtree(folder / MODEL, ignore_errors=True)  # of a resumed run, whose model is still in best.ckpt
    try:
        trainer.fit(model, datamodule=data, ckpt_path=str(start) if start else None, weights_only=True)
        finish(trainer, model, data, checkpoint, run)
    except Interrupted as stopped:
        return ended(stopped.status, run, f"Interrupted after {model.updates:,} updates and saved. To resume:\n  {resume_command(run)}")
    except SystemExit as stopped:  # raised by Lightning for a signal outside training, for example while the best checkpoint is scored
        status = REQUEUE if isinstance(stopped, SIGTERMException) else INTERRUPTED
        outcome = ended(status, run, f"Interrupted. To resume from the last checkpoint:\n  {resume_command(run)}")
        if dist.is_initialized():  # the other ranks may not have got the signal
            leave(status, together=False)
        return outcome
    except MisconfigurationException as error:  # Lightning's own UserError
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error
    except RuntimeError as error:
        if str(error).startswith("Early stopping conditioned on metric"):
            raise UserError(f"trainer.callbacks: {error}") from error
        if not lost_a_rank(error):
            raise
        lost = f"rank {trainer.global_rank} {'lost' if dist.is_initialized() else 'could not reach'} another rank"
        remedy = "There is no checkpoint yet: start the run again"
        if run.folder is not None and has_checkpoint(run.folder):
            remedy = f"To resume from the last checkpoint:\n  {resume_command(run)}"
        message = f"{lost} ({str(error).splitlines()[0]}). {remedy}"
        print(f"error: {message}", file=sys.stderr)
        return Outcome(LOST_RANK, run.folder, message)
    return Outcome(0, run.folder)


def monitored(monitor: str) -> str:
    """The name of a score from --monitor. Raises UserError for another split than validation."""
    split, _, name = monitor.rpartition("/")
    if split not in ("", "val"):
        raise UserError(f"--monitor={monitor}: the best checkpoint is chosen by a validation score; expected --monitor={name}")
    return name


def ended(status: int, run: RunFolder, message: str) -> Outcome:
    """Print the message; returns the outcome."""
    print_rank_zero(f"\n{message}")
    return Outcome(status, run.folder, message)


def resume_command(run: RunFolder) -> str:
    return f"{command('fit')} --resume {run.folder}"


def parse_settings(arguments: Sequence[str]) -> tuple[FusionCLI, Path | None]:
    """The parsed settings, and the run folder to resume, if any. Raises UserError for invalid settings."""
    resumed = resumed_run(arguments)
    if resumed is not None:
        others = [word for is_value, word in words(arguments, "--resume") if not is_value]
        arguments = ["--config", str(resumed / "recipe.yaml"), *others]
    if not arguments:
        raise UserError(
            "no recipe is given: use --recipe quickstart, or --recipe own --data.manifest=FILE.csv; fusion fit --help lists the options"
        )
    cli = FusionCLI(arguments)
    if resumed is not None:
        reject_recipe_changes(cli.resolved(), (resumed / "recipe.yaml").read_text(encoding="utf-8"), others)
    return cli, resumed


def standing_callbacks(run: RunFolder, seed: int) -> list[Callback]:
    """The callbacks of every run, whatever its recipe."""
    save = SaveInTime()
    return [run, EpochLines(), SeedEachStep(seed), AgreeFirst(save), Guard(run), save]


def choose_kernels(float32_matmul_precision: str) -> None:
    """Set the precision and kernels of CUDA, for the whole process."""
    torch.set_float32_matmul_precision(float32_matmul_precision)
    torch.backends.cudnn.allow_tf32 = float32_matmul_precision != "highest"  # of convolutions, for which torch has a separate setting
    torch.backends.cuda.enable_cudnn_sdp(False)  # it builds a plan for each (batch, length), and texts have many lengths


def print_data_notes(data: FusionData) -> None:
    """Print the data's card, the dropped samples and the notes on the data."""
    if data.card:
        print_rank_zero(data.card)
    if data.issues.dropped:
        print_rank_zero(f"warning: {data.issues.summary()}")
    for note in data.issues.notes:
        print_rank_zero(f"note: {note}")


def finish(trainer: Trainer, model: Engine, data: FusionData, checkpoint: ModelCheckpoint, run: RunFolder) -> None:
    """Score the best checkpoint on the test split; print the result and write it with the model to the run folder."""
    best = checkpoint.best_model_path or checkpoint.last_model_path or None  # None for a run without a single update
    # Read first, since testing loads the best checkpoint's numbers.
    updates, mixing = model.updates, None if model.mixer is None else shares(model.mixer.totals(model))
    teacher = None if model.distillation is None else model.distillation.report(model)
    scores: dict[str, float] = {}
    lines: list[list[str]] = []
    counted: dict[str, int] = {}
    if "test" in data.splits:
        trainer.test(model, datamodule=data, ckpt_path=best, verbose=False, weights_only=True)
        scores = {name.removeprefix("test/"): float(value) for name, value in trainer.callback_metrics.items() if name.startswith("test/")}
    if scores:  # not with trainer.limit_test_batches=0
        table = data.splits["test"].table
        task = model.task
        informative = informative_bounds(task, table, model.modalities)
        scores |= {f"{'floor' if task.bounded in task.minimised else 'ceiling'}_{name}": bound for name, bound in informative.items()}
        batch_size = trainer.test_dataloaders[0].batch_sampler.batch_size * trainer.world_size  # type: ignore[index]
        scored = min(len(table), trainer.num_test_batches[0] * batch_size)  # limited by trainer.limit_test_batches
        all_samples = f"{len(table):,}" if scored < len(table) else ""
        lines = [
            ["test", *task.headline, "samples"],
            ["this model", *(figure(scores[name]) for name in task.headline.values()), f"{scored:,}"],
        ]
        for name, bound in informative.items():
            entries = [figure(bound) if score == task.bounded else "" for score in task.headline.values()]
            lines.append([bound_title(task, name), *entries, all_samples])
        counted = {"test_samples": scored}
    if trainer.is_global_zero and run.folder is not None:
        rates = [round(rate, 1) for lines in trainer.callbacks if isinstance(lines, EpochLines) for rate in lines.rates]  # type: ignore[attr-defined]
        results = {"test": finite(scores), "val": validated(run.folder, model.task), "updates": updates, **counted}
        results |= {} if mixing is None else {"mixing": mixing}
        results |= {} if teacher is None else {"teacher": teacher}
        for name, content in (
            ("results.json", results),
            ("timing.json", {"samples_per_s": rates}),
        ):  # apart: no two runs take the same time
            (run.folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if best is not None and trainer.is_global_zero and run.folder is not None:
        write_bundle(run.folder / MODEL, *of_checkpoint(read_checkpoint(best), Path(best)))
    print_rank_zero("\n" + aligned(lines) if lines else "\nno test samples: nothing scored")
    if mixing is not None:
        print_rank_zero(f"\n{report(mixing)}")
    if teacher is not None:
        print_rank_zero(f"\n{report_line(teacher)}")
    print_rank_zero(f"\nrun folder  {run.folder}")
    if best is None:
        print_rank_zero("no update was made, so there is no checkpoint: this model can't be used")
        return
    print_rank_zero(f"score it    {command('evaluate')} --run {run.folder}")
    print_rank_zero(f"use it      {command('predict')} --run {run.folder} --manifest FILE")


INFORMATIVE = 0.5  # least share of samples with a repeated input; unique inputs allow a perfect score, a bound without information


def informative_bounds(task: Task, table: Table, modalities: Sequence[str]) -> dict[str, float]:
    """The bounds that are informative for these samples: of each modality that the model reads, if its inputs mostly repeat; and of one
    answer for all samples."""
    if task.draws_apart:  # a pair isn't to be guessed from one of its inputs
        return bounds(task, {}, table.labels)
    inputs = {name: [table.kinds[name].identity(cell) for cell in table.inputs[name]] for name in modalities}
    by_name = bounds(task, {name: identities for name, identities in inputs.items() if repeated(identities) >= INFORMATIVE}, table.labels)
    baseline = by_name.pop(task.baseline)
    return {**by_name, task.baseline: baseline}


def validated(folder: Path, task: Task) -> dict[str, float]:
    """The logged scores of the best validation; none if there was no validation."""
    path, monitor = folder / METRICS, f"val/{task.monitor}"
    records = [record for record in read_metrics(path) if monitor in record] if path.is_file() else []
    if not records:
        return {}
    best = (max if task.mode == "max" else min)(records, key=lambda record: float(record[monitor]))
    return finite({name.removeprefix("val/"): float(value) for name, value in best.items() if name.startswith("val/")})


def finite(scores: Mapping[str, float]) -> dict[str, float]:
    """Without scores that are undefined for the samples (NaN), which JSON has no value for."""
    return {name: value for name, value in scores.items() if math.isfinite(value)}


# Console output


def run_name(arguments: Sequence[str]) -> str:
    """The name of the first recipe on the command line, else "fit"."""
    return next((Path(word).stem for is_value, word in words(arguments, "--recipe") if is_value), "fit")


FIT_COMMAND = "FUSION_FIT_COMMAND"  # set by programs that start fit differently; the command to print for resuming


def command(name: str) -> str:
    """The command line of another command of this program, in the way this one was called."""
    if name == "fit" and FIT_COMMAND in os.environ:
        return os.environ[FIT_COMMAND]
    script = Path(sys.argv[0])
    if script.name == "__main__.py":
        return f"python -m fusion {name}"
    return f"python {shlex.quote(str(script.with_name(f'{name}.py')))}" if script.suffix == ".py" else f"fusion {name}"


def silence_harmless_warnings() -> None:
    """Silence warnings and progress bars of libraries that appear in every run and need no action."""
    for pattern in (
        ".*You're resuming from a checkpoint that ended before the epoch ended.*",  # the batch sampler does resume within an epoch
        ".*does not have many workers.*",  # images in memory need none
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*It is recommended to use `self.log.*sync_dist=True.*",  # the metrics are already summed over the ranks
        ".*smaller than the logging interval.*",
        ".*LeafSpec.*",
        ".*WeightAveraging callback with a model that overrides the configure_model.*",  # which only shards the model, under FSDP
        ".*module\\(s\\) in eval mode at the start of training.*",  # frozen modules
        ".*Experiment logs directory .* exists and is not empty.*",  # made by RunFolder
    ):
        warnings.filterwarnings("ignore", message=pattern)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.disable_progress_bar()  # of loading weights, which takes a second
    if not sys.stderr.isatty():
        disable_progress_bars()  # of downloads, which would fill a log with thousands of lines
