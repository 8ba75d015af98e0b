"""The Lightning command line over our engine and data, with recipes, and with errors that name the nearest thing that exists."""

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
from fusion.settings.mistakes import rejected_by_constructor, told_plainly
from fusion.settings.recipes import PATH_KEYS, Recipe, stack
from fusion.training import Engine
from fusion.training.callbacks.checkpoints import AtomicCheckpointIO
from fusion.training.callbacks.progress import Bar
from fusion.training.callbacks.run_folder import RunFolder
from fusion.training.distributed.ddp import DDP

TRAINER_DEFAULTS = {
    "max_epochs": 10,
    "enable_model_summary": False,  # the plan tells
    "use_distributed_sampler": False,  # our batches are already shared out among the ranks
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
}


class FusionCLI(LateCLI):
    """Parses recipes and options into settings; `make` turns them into model, data and trainer when asked to."""

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
            "--recipe", type=str | None, help="Name under recipes/ or path of a YAML file; may be repeated, later ones win."
        )
        parser.add_argument("--resume", type=str | None, help="Run folder to continue exactly where it stopped.")
        parser.add_argument(
            "--init_from",
            type=str | None,
            help="Run, checkpoint or file of weights to start from; only those whose name and shape fit.",
        )
        parser.add_argument("--checkpoint.every_updates", type=int | None, help="Also save last.ckpt after so many updates.")
        parser.add_argument("--checkpoint.every_minutes", type=float | None, help="Also save last.ckpt after so many minutes.")
        parser.add_argument(
            "--float32_matmul_precision",
            type=Literal["highest", "high", "medium"],
            default="highest",
            help="Of float32 products and convolutions on GPUs: high is tf32, faster and of fewer digits (10 bits instead of 23).",
        )
        parser.add_argument("--runs", type=str, default="runs", help="Folder under which run folders are made.")
        parser.set_defaults({"model.task": {"class_path": "fusion.tasks.Classification"}})
        parser.link_arguments("seed_everything", "data.init_args.seed" if self.subclass_mode_data else "data.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        expanded, recipes = expand_recipes(args)
        try:
            self.config = parser.parse_args([as_written(word) for word in expanded])
        except (ArgumentError, OmegaConfBaseException) as error:
            raise UserError(told_plainly(str(error), parser, recipes)) from error
        for key in PATH_KEYS:  # so that the saved recipe means the same from anywhere
            if self.config.data[key]:
                self.config.data[key] = os.path.abspath(os.path.expanduser(self.config.data[key]))

    def instantiate_classes(self) -> None:
        """Not at parsing: see `make`."""

    def make(self, callbacks: list[Any]) -> tuple[Engine, FusionData, Trainer]:
        """The objects. Raises UserError for values that they refuse."""
        self.trainer_defaults["callbacks"] = callbacks
        with self.constructors():
            super().instantiate_classes()
        # First, since it brings the loggers that others look for.
        self.trainer.callbacks.sort(key=lambda callback: not isinstance(callback, RunFolder))  # type: ignore[attr-defined]
        self.datamodule.processes_per_node = self.trainer.num_devices
        if self.datamodule.device_batch_size is not None:
            devices = self.trainer.num_devices * self.trainer.num_nodes
            self.trainer.accumulate_grad_batches = accumulate(self.config, self.datamodule, devices)
        return self.model, self.datamodule, self.trainer

    def model_and_data(self) -> tuple[Engine, FusionData]:
        """Without a trainer, whose devices need not be here."""
        with self.constructors():
            made = self.parser.instantiate(self.config)
        return made.model, made.data

    @contextmanager
    def constructors(self) -> Iterator[None]:
        """Around the constructors of all that a recipe names: what they reject, in one line."""
        try:
            with construction():
                yield
        except ArgumentError as error:
            raise UserError(told_plainly(str(error), self.parser, [])) from error
        except UserError as error:
            raise UserError(rejected_by_constructor(str(error))) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        plugins = self.config_init.trainer.plugins
        listed = plugins if isinstance(plugins, list) else [plugins] if plugins is not None else []
        # RunFolder brings the loggers; Lightning's own default would leave lightning_logs/ wherever the command is run.
        logger = self.config_init.trainer.logger
        plugins, logger = [*listed, AtomicCheckpointIO()], False if logger is None else logger
        given = self.config_init.trainer.callbacks or []
        given = given if isinstance(given, list) else [given]
        bars = [type(callback).__name__ for callback in given if isinstance(callback, ProgressBar)]
        if bars and self.config_init.trainer.enable_progress_bar is False:
            raise UserError(f"trainer.enable_progress_bar is false, but trainer.callbacks has {bars[0]}: leave out one of the two")
        if self.config_init.trainer.enable_progress_bar is not False and not bars:
            self.trainer_defaults["callbacks"] = [Bar(), *self.trainer_defaults["callbacks"]]  # before the lines, which it lets through
        try:
            strategy = own_ddp(self.config_init.trainer)
            more = kwargs if strategy is None else {**kwargs, "strategy": strategy}
            return super().instantiate_trainer(plugins=plugins, logger=logger, **more)
        except (TypeError, MisconfigurationException) as error:
            raise UserError(f"trainer: {' '.join(str(error).split())}") from error

    def resolved(self) -> str:
        """Every setting, as a recipe. Raises UserError for one that YAML can't say."""
        try:
            return self.parser.dump(self.config, skip_link_targets=True, skip_unset=False, format="yaml")
        except ValueError as error:
            found = re.search(r"\('cannot represent an object', (.+?)\)\n", str(error))
            if found is None:
                raise
            cls = re.search(r"class_path='[\w.]*?(\w+)'", str(error))
            raise UserError(
                f"{cls[1] if cls else 'a class'} has an option whose value, {found[1]}, a recipe can't hold; "
                "give that option as text or as a number"
            ) from error


def own_ddp(asked: Any) -> DDP | None:
    """Our strategy, where Lightning would take its own for several processes: by itself, or by one of its names."""
    if asked.strategy not in ("auto", "ddp", "ddp_find_unused_parameters_true"):
        return None
    options: dict[str, Any] = {name: asked[name] for name in ("accelerator", "devices", "num_nodes", "strategy")}
    options |= dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    chosen = Trainer(**options).strategy
    return DDP(find_unused_parameters=asked.strategy.endswith("true")) if type(chosen) is DDPStrategy else None


def accumulate(config: Any, data: FusionData, devices: int) -> int:
    """The accumulated batches of an update: as given, or as data.device_batch_size asks. Raises UserError where both are given."""
    given = config.trainer.accumulate_grad_batches
    if data.device_batch_size is None:
        return given
    if given != 1:
        raise UserError("give trainer.accumulate_grad_batches or data.device_batch_size, from which it follows; not both")
    return accumulation(data.batch_size, devices, data.device_batch_size)


def fit_help() -> str:
    return "Train a model by recipe: fusion fit --recipe quickstart [--recipe heads/gated] [--model.head=NAME] [--trainer.max_epochs=N] ..."


def expand_recipes(arguments: Sequence[str]) -> tuple[list[str], list[Recipe]]:
    """Each --recipe replaced, in its place, by the files that it stands for, so that what comes later on the line wins; and these files."""
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
    """--data.where=... with its cells as texts: YAML would take 010 for 8, 12:30:00 for a number of seconds and yes for a boolean.

    >>> as_written("--data.where={code: 010, label: [yes, no]}")
    '--data.where={"code": "010", "label": ["yes", "no"]}'
    """
    option, equals, value = word.partition("=")
    if option != "--data.where" or not equals:
        return word
    try:
        asked = yaml.load(value, yaml.BaseLoader)
    except yaml.YAMLError:
        return word  # told as any other mistake
    return f"{option}={json.dumps(asked)}" if isinstance(asked, dict) else word


def words(arguments: Sequence[str], option: str) -> Iterator[tuple[bool, str]]:
    """The line's words in order, and whether each is a value of `option`, which itself is left out; "" for a value that is missing.

    >>> list(words(["--a=1", "--recipe", "x", "--recipe=y"], "--recipe"))
    [(False, '--a=1'), (True, 'x'), (True, 'y')]
    """
    waiting = iter(arguments)
    for word in waiting:
        name, equals, value = word.partition("=")
        if name == option:
            yield True, value if equals else next(waiting, "")
        else:
            yield False, word
