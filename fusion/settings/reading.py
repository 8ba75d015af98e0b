"""How evaluate and predict read a manifest: as the run read its own, unless options named as those of fit say otherwise."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser
from omegaconf import OmegaConf

from fusion.data import FusionData
from fusion.data.format import Format
from fusion.data.kinds import Kind
from fusion.data.table import Columns
from fusion.errors import UserError
from fusion.predictor import Predictor
from fusion.runs.bundle import is_bundle
from fusion.settings.error_messages import plain_message

PREFIXES = ("--data.columns.", "--data.format.")
HELP = "--data.columns.NAME and --data.format.NAME, as in fit, describe a manifest whose columns or format differ from the run's own."


def reading_options(arguments: Sequence[str], prefixes: tuple[str, ...] = PREFIXES) -> tuple[list[str], list[str]]:
    """The command's own arguments, and those that begin with one of the prefixes: by default those that say how a manifest is read.

    >>> reading_options(["--run", "r", "--data.columns.text", "question", "--data.format.separator=;"])
    (['--run', 'r'], ['--data.columns.text', 'question', '--data.format.separator=;'])
    """
    own: list[str] = []
    reading: list[str] = []
    words = iter(arguments)
    for word in words:
        if not word.startswith(prefixes):
            own.append(word)
            continue
        reading.append(word)
        if "=" not in word:
            reading += islice(words, 1)
    return own, reading


def reading_of(run: Path, options: Sequence[str]) -> tuple[Columns, Format]:
    """The columns and the format of a run's manifest, overridden by options; the defaults for a checkpoint file, which has none."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_class_arguments(Columns, "data.columns")
    parser.add_class_arguments(Format, "data.format")
    settings = settings_of(run) if is_run(run) else {}
    own = {name: settings[name] for name in ("columns", "format") if settings.get(name)}
    try:
        objects = parser.instantiate(parser.parse_args([f"--config={yaml.safe_dump({'data': own})}", *options]))
    except ArgumentError as error:
        raise UserError(plain_message(str(error), parser, [])) from error
    return objects.data.columns, objects.data.format


def inputs_for(predictor: Predictor, columns: Columns, run: Path) -> dict[str, Kind]:
    """The inputs of a run's model, reading these columns of a manifest."""
    of_run = is_run(run)
    named = (settings_of(run).get("inputs") or {}) if of_run else {}
    inputs: dict[str, Kind] = {}
    for name, kind in predictor.processor.inputs.items():
        is_short = name in ("image", "text") and name not in named
        column = getattr(columns, name) if is_short else ""
        replaced = is_short and (of_run or column != getattr(Columns, name))  # a model without its run stores its own columns
        inputs[name] = type(kind)(column) if replaced else kind
        inputs[name].option = f"data.columns.{name}" if is_short else ""  # the columns of data.inputs are those of the run
    return inputs


def is_run(run: Path) -> bool:
    """Whether this is a run folder, rather than a model folder or a checkpoint file."""
    return run.is_dir() and not is_bundle(run)


def data_of(run: Path) -> FusionData:
    """The data of a run, as in its recipe; not loaded."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FusionData, "data", sub_configs=True)
    try:
        return parser.instantiate(parser.parse_object({"data": settings_of(run)})).data
    except ArgumentError as error:
        raise UserError(f"{run / 'recipe.yaml'}: {plain_message(str(error), parser, [])}") from error


def settings_of(run: Path) -> Any:
    """The data section of a run's recipe."""
    recipe = run / "recipe.yaml"
    if not run.exists():
        raise UserError(f"there is no run {run}")
    if not recipe.is_file():
        raise UserError(f"{run} has no recipe.yaml; expected the run folder printed by fit")
    settings: Any = OmegaConf.to_container(OmegaConf.load(recipe))
    return settings["data"]
