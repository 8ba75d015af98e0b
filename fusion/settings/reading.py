"""How evaluate and predict read a manifest: as the run read its own, or as options ask that are named as those of fit."""

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
from fusion.settings.mistakes import told_plainly

PREFIXES = ("--data.columns.", "--data.format.")
HELP = "--data.columns.NAME and --data.format.NAME, as in fit, say how the manifest is written where that differs from the run's own."


def reading_options(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command's own words, and those that say how a manifest is read.

    >>> reading_options(["--run", "r", "--data.columns.text", "question", "--data.format.separator=;"])
    (['--run', 'r'], ['--data.columns.text', 'question', '--data.format.separator=;'])
    """
    own: list[str] = []
    reading: list[str] = []
    words = iter(arguments)
    for word in words:
        if not word.startswith(PREFIXES):
            own.append(word)
            continue
        reading.append(word)
        if "=" not in word:
            reading += islice(words, 1)
    return own, reading


def reading_of(run: Path, options: Sequence[str]) -> tuple[Columns, Format]:
    """The columns and the format of a run's manifest, changed by options; defaults for a checkpoint file, which doesn't know them."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_class_arguments(Columns, "data.columns")
    parser.add_class_arguments(Format, "data.format")
    settings = settings_of(run) if is_run(run) else {}
    own = {name: settings[name] for name in ("columns", "format") if settings.get(name)}
    try:
        made = parser.instantiate(parser.parse_args([f"--config={yaml.safe_dump({'data': own})}", *options]))
    except ArgumentError as error:
        raise UserError(told_plainly(str(error), parser, [])) from error
    return made.data.columns, made.data.format


def inputs_for(predictor: Predictor, columns: Columns, run: Path) -> dict[str, Kind]:
    """The inputs of a run's model as a manifest with these columns has them."""
    of_run = is_run(run)
    named = (settings_of(run).get("inputs") or {}) if of_run else {}
    found: dict[str, Kind] = {}
    for name, kind in predictor.processor.inputs.items():
        usual = name in ("image", "text") and name not in named
        asked = getattr(columns, name) if usual else ""
        others = usual and (of_run or asked != getattr(Columns, name))  # a model alone knows its columns itself
        found[name] = type(kind)(asked) if others else kind
        found[name].option = f"data.columns.{name}" if usual else ""  # a named input's columns are the run's
    return found


def is_run(run: Path) -> bool:
    """Whether it is a run's folder, and not a model's folder or a checkpoint file alone."""
    return run.is_dir() and not is_bundle(run)


def data_of(run: Path) -> FusionData:
    """The data of a run, as its recipe says; not loaded."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FusionData, "data", sub_configs=True)
    try:
        return parser.instantiate(parser.parse_object({"data": settings_of(run)})).data
    except ArgumentError as error:
        raise UserError(f"{run / 'recipe.yaml'}: {told_plainly(str(error), parser, [])}") from error


def settings_of(run: Path) -> Any:
    """What a run's recipe says of its data."""
    recipe = run / "recipe.yaml"
    if not run.exists():
        raise UserError(f"there is no run {run}")
    if not recipe.is_file():
        raise UserError(f"{run} has no recipe.yaml; expected the run folder that fit printed")
    settings: Any = OmegaConf.to_container(OmegaConf.load(recipe))
    return settings["data"]
