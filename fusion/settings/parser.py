"""The Lightning command line for our engine and data, with recipes and with error messages that name the nearest known name."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from fusion.data import FusionData
from fusion.data.sampler import accumulation
from fusion.errors import UserError, construction
from fusion.lightning_private import LateCLI
from fusion.settings.error_messages import plain_message, rejected_by_constructor
from fusion.settings.recipes import PATH_KEYS, Recipe, stack
from fusion.training import Engine
from fusion.training.callbacks.checkpoints import AtomicCheckpointIO
from fusion.training.callbacks.progress import Bar
from fusion.training.callbacks.run_folder import RunFolder
from fusion.training.distributed.ddp import DDP

TRAINER_DEFAULTS = {
    "max_epochs": 10,
    "enable_model_summary": False,  # the plan shows it
    "use_distributed_sampler": False,  # our batches are already distributed among the ranks
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
}


class FusionCLI(LateCLI):
    """Parses recipes and options into settings, from which `make` builds model, data and trainer."""

    def __init__(self, arguments: Sequence[str]) -> None:
        super().__init__(
            Engine,
            FusionData,
            save_config_callback=None,
            trainer_defaults=dict(TRAINER_DEFAULTS),
            seed_everything_default=0,
            # Interpolations are resolved after overrides; the plain "omegaconf" mode would resolve them before.
            parser_kwargs={
                "parser_mode": "omegaconf+",
                "exit_on_error": False,
                "allow_abbrev": False,
                "prog": "fusion fit",
                "description": fit_help(),
            },
            args=list(arguments),
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--recipe", type=str | None, help="Name under recipes/ or path of a YAML file; may be repeated, later ones take precedence."
        )
        parser.add_argument("--resume", type=str | None, help="Run folder to resume exactly where it stopped.")
        parser.add_argument(
            "--init_from",
            type=str | None,
            help="Run, checkpoint or file of weights to start from; weights are loaded where name and shape match.",
        )
        parser.add_argument(
            "--monitor",
            type=str | None,
            help="Validation score by which the best checkpoint is chosen (and early stopping decides): any score of the task, or loss.",
        )
        parser.add_argument("--checkpoint.every_updates", type=int | None, help="Also save last.ckpt every so many updates.")
        parser.add_argument("--checkpoint.every_minutes", type=float | None, help="Also save last.ckpt every so many minutes.")
        parser.add_argument(
            "--float32_matmul_precision",
            type=Literal["highest", "high", "medium"],
            default="highest",
            help="Of float32 matrix products and convolutions on GPUs; high is TF32: faster, with a mantissa of 10 bits instead of 23.",
        )
        parser.add_argument("--runs", type=str, default="runs", help="Folder in which run folders are created.")
        parser.set_defaults({"model.task": {"class_path": "fusion.tasks.Classification"}})
        parser.link_arguments("seed_everything", "data.init_args.seed" if self.subclass_mode_data else "data.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        expanded, recipes = expand_recipes(args)
        try:
            self.config = parser.parse_args([as_written(word) for word in expanded])
        except (ArgumentError, OmegaConfBaseException) as error:
            raise UserError(plain_message(str(error), parser, recipes)) from error
        for key in PATH_KEYS:  # so that the saved recipe doesn't depend on the working folder
            if self.config.data[key]:
                self.config.data[key] = absolute_path(self.config.data[key])
        teacher = self.config.model.teacher
        if teacher is not None and teacher.runs:
            teacher.runs = absolute_path(teacher.runs) if isinstance(teacher.runs, str) else list(map(absolute_path, teacher.runs))

    def instantiate_classes(self) -> None:
        """Does nothing: the classes are instantiated by `make`, not when parsing."""

    def make(self, callbacks: list[Any]) -> tuple[Engine, FusionData, Trainer]:
        """Build engine, data and trainer. Raises UserError for values that they reject."""
        self.trainer_defaults["callbacks"] = callbacks
        with self.constructors():
            super().instantiate_classes()
        # First, since it adds the loggers that other callbacks use.
        self.trainer.callbacks.sort(key=lambda callback: not isinstance(callback, RunFolder))  # type: ignore[attr-defined]
        self.datamodule.processes_per_node = self.trainer.num_devices
        if self.datamodule.device_batch_size is not None:
            devices = self.trainer.num_devices * self.trainer.num_nodes
            self.trainer.accumulate_grad_batches = accumulate(self.config, self.datamodule, devices)
        return self.model, self.datamodule, self.trainer

    def model_and_data(self) -> tuple[Engine, FusionData]:
        """Build engine and data without a trainer, whose devices need not be available."""
        with self.constructors():
            objects = self.parser.instantiate(self.config)
        return objects.model, objects.data

    @contextmanager
    def constructors(self) -> Iterator[None]:
        """Turn errors raised by the constructors of a recipe's classes into one-line UserErrors."""
        try:
            with construction():
                yield
        except ArgumentError as error:
            raise UserError(plain_message(str(error), self.parser, [])) from error
        except UserError as error:
            raise UserError(rejected_by_constructor(str(error))) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        plugins = self.config_init.trainer.plugins
        listed = plugins if isinstance(plugins, list) else [plugins] if plugins is not None else []
        # RunFolder adds the loggers; Lightning's default would create lightning_logs/ in the working folder.
        logger = self.config_init.trainer.logger
        plugins, logger = [*listed, AtomicCheckpointIO()], False if logger is None else logger
        callbacks = self.config_init.trainer.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        bars = [type(callback).__name__ for callback in callbacks if isinstance(callback, ProgressBar)]
        if bars and self.config_init.trainer.enable_progress_bar is False:
            raise UserError(f"trainer.enable_progress_bar is false, but trainer.callbacks has {bars[0]}: remove one of the two")
        if self.config_init.trainer.enable_progress_bar is not False and not bars:
            self.trainer_defaults["callbacks"] = [Bar(), *self.trainer_defaults["callbacks"]]  # before EpochLines, which prints through it
        try:
            strategy = own_ddp(self.config_init.trainer)
            more = kwargs if strategy is None else {**kwargs, "strategy": strategy}
            return super().instantiate_trainer(plugins=plugins, logger=logger, **more)
        except (TypeError, MisconfigurationException) as error:
            raise UserError(f"trainer: {' '.join(str(error).split())}") from error

    def resolved(self) -> str:
        """Every setting, as a recipe. Raises UserError for a value that YAML can't represent."""
        try:
            return self.parser.dump(self.config, skip_link_targets=True, skip_unset=False, format="yaml")
        except ValueError as error:
            match = re.search(r"\('cannot represent an object', (.+?)\)\n", str(error))
            if match is None:
                raise
            cls = re.search(r"class_path='[\w.]*?(\w+)'", str(error))
            raise UserError(
                f"{cls[1] if cls else 'a class'} has an option whose value, {match[1]}, can't be stored in a recipe; "
                "give that option as text or as a number"
            ) from error


def absolute_path(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path)) if path and "://" not in path else path


def own_ddp(settings: Any) -> DDP | None:
    """Our DDP strategy, if Lightning would choose its own, by default or by name; else None."""
    if settings.strategy not in ("auto", "ddp", "ddp_find_unused_parameters_true"):
        return None
    options: dict[str, Any] = {name: settings[name] for name in ("accelerator", "devices", "num_nodes", "strategy")}
    options |= dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    chosen = Trainer(**options).strategy
    return DDP(find_unused_parameters=settings.strategy.endswith("true")) if type(chosen) is DDPStrategy else None


def accumulate(config: Any, data: FusionData, devices: int) -> int:
    """The number of accumulated batches, as given or derived from data.device_batch_size. Raises UserError if both are given."""
    batches = config.trainer.accumulate_grad_batches
    if data.device_batch_size is None:
        return batches
    if batches != 1:
        raise UserError("give either trainer.accumulate_grad_batches or data.device_batch_size, which determines it, not both")
    return accumulation(data.batch_size, devices, data.device_batch_size)


def fit_help() -> str:
    return "Train a model by recipe: fusion fit --recipe quickstart [--recipe heads/gated] [--model.head=NAME] [--trainer.max_epochs=N] ..."


def expand_recipes(arguments: Sequence[str]) -> tuple[list[str], list[Recipe]]:
    """The arguments with each --recipe replaced in place by its files, so that later arguments override earlier ones; and these recipes."""
    expanded: list[str] = []
    recipes: list[Recipe] = []
    for is_value, word in words(arguments, "--recipe"):
        if not is_value:
            expanded.append(word)
            continue
        if not word:
            raise UserError("--recipe needs a name or a path; for example --recipe quickstart")
        for recipe in stack(word):
            recipes.append(recipe)
            expanded += ["--config", recipe.to_yaml()]
    return expanded, recipes


def as_written(word: str) -> str:
    """--data.where=... with its values quoted: YAML would read 010 as 8, 12:30:00 as a number of seconds and yes as a boolean.

    >>> as_written("--data.where={code: 010, label: [yes, no]}")
    '--data.where={"code": "010", "label": ["yes", "no"]}'
    """
    option, equals, value = word.partition("=")
    if option != "--data.where" or not equals:
        return word
    try:
        selection = yaml.load(value, yaml.BaseLoader)
    except yaml.YAMLError:
        return word  # reported by the parser
    return f"{option}={json.dumps(selection)}" if isinstance(selection, dict) else word


def words(arguments: Sequence[str], option: str) -> Iterator[tuple[bool, str]]:
    """The arguments in order, each with whether it is a value of `option`, which itself is omitted; "" for a missing value.

    >>> list(words(["--a=1", "--recipe", "x", "--recipe=y"], "--recipe"))
    [(False, '--a=1'), (True, 'x'), (True, 'y')]
    """
    remaining = iter(arguments)
    for word in remaining:
        name, equals, value = word.partition("=")
        if name == option:
            yield True, value if equals else next(remaining, "")
        else:
            yield False, word
