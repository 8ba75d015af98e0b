"""The command line's help: what jsonargparse shows of every option that a recipe can set."""

import inspect
import re
from argparse import SUPPRESS
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any, get_args, get_type_hints

import docstring_parser
import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer

import fusion.data
import fusion.data.kinds
import fusion.encoders
import fusion.heads
import fusion.tasks
import fusion.training
from fusion.data import Columns, Curriculum, Format, FusionData, Preparer
from fusion.data.kinds import Kind
from fusion.encoders import Encoder
from fusion.heads import FusionHead, Gated, Unimodal
from fusion.heads.registry import HEADS
from fusion.tasks import Task
from fusion.training import Balance, Engine, Freeze, Rate, Schedule

PACKAGES = (fusion.heads, fusion.encoders, fusion.tasks, fusion.data, fusion.data.kinds, fusion.training)
BASES = (FusionHead, Encoder, Task, Kind, Preparer, Schedule, Balance, Strategy, Precision, Callback, Optimizer)
NOT_OPTIONS = {"dims", "out_dim", "params"}  # passed by the engine
OF_A_GROUP = "Path to a configuration file."  # jsonargparse's own, of an option that is a group of options


def recipe_classes() -> list[type]:
    """The classes that a recipe can name or set: by their bases, the two at the top, and the dataclasses among the options of all these."""
    public = [getattr(package, name) for package in PACKAGES for name in package.__all__]
    named = [thing for thing in public if inspect.isclass(thing) and issubclass(thing, BASES) and thing not in BASES]
    found = [Engine, FusionData, *HEADS.values(), *(cls for cls in named if not inspect.isabstract(cls))]
    found += [part for cls in found for hint in get_type_hints(cls.__init__).values() for part in parts(hint) if is_dataclass(part)]
    return sorted(set(found), key=lambda cls: f"{cls.__module__}.{cls.__qualname__}")


def parts(hint: Any) -> Iterator[Any]:
    """A type and all that it is made of."""
    if isinstance(hint, list):  # arguments of a Callable
        for part in hint:
            yield from parts(part)
        return
    yield hint
    for part in get_args(hint):
        yield from parts(part)


def help_of_options(cls: type) -> dict[str, str]:
    """By option, its help as the command line shows it; "" where there is none."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "x", skip=NOT_OPTIONS, fail_untyped=False)
    shown = {str(action.dest): str(action.help or "") for action in parser._actions}
    found = {}
    for name in list(inspect.signature(cls.__init__).parameters)[1:]:
        if name in NOT_OPTIONS:
            continue
        text = shown.get(f"x.{name}", "")
        if text == OF_A_GROUP:
            text = described(cls).get(name, "")
        found[name] = "" if text == SUPPRESS or re.fullmatch(r"\((type|default|required)\b.*\)", text, re.DOTALL) else text.strip()
    return found


def described(cls: type) -> dict[str, str]:
    """The arguments that the docstrings of a class and its bases describe."""
    parsed = [docstring_parser.parse(base.__doc__ or "") for base in reversed(cls.__mro__)]
    return {param.arg_name: param.description or "" for one in parsed for param in one.params}


@pytest.mark.parametrize("cls", recipe_classes(), ids=lambda cls: cls.__name__)
def test_every_option_that_a_recipe_can_set_has_help(cls: type) -> None:
    without = [name for name, text in help_of_options(cls).items() if not text]
    assert not without, f"{cls.__qualname__}: its docstring has no line under Args: for {', '.join(without)}"


def test_classes_of_every_base_and_the_dataclasses_of_options_are_looked_at() -> None:
    found = recipe_classes()
    assert [base.__name__ for base in BASES if not any(issubclass(cls, base) for cls in found)] == []
    assert {Engine, FusionData, *HEADS.values(), Unimodal, Freeze, Rate, Curriculum, Columns, Format} <= set(found)


@dataclass
class Named:
    """Options in a group of their own.

    Args:
        first: the first.
    """

    first: int = 1


class Described:
    """A base whose option is inherited.

    Args:
        inherited: by the subclass.
    """

    def __init__(self, inherited: int = 1) -> None:
        pass


class HalfDescribed(Described):
    """With and without help.

    Args:
        told: on one line
            or two.
        group: several.
        dims: not an option.

    >>> 1 + 1
    2
    """

    def __init__(self, dims: int, group: Named, other: Named, told: int = 1, untold: int = 1, inherited: int = 1) -> None:
        pass


def test_an_option_without_help_is_found() -> None:
    expected = {"told": "on one line\nor two.", "untold": "", "inherited": "by the subclass.", "group": "several.", "other": ""}
    assert help_of_options(HalfDescribed) == expected


def test_the_help_of_a_head_shows_what_its_docstring_says_of_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = re.findall(r"^ +dim: (.+)$", Gated.__doc__ or "", re.MULTILINE)
    parser = ArgumentParser()
    parser.add_subclass_arguments(FusionHead, "head", skip=NOT_OPTIONS, fail_untyped=False)
    with pytest.raises(SystemExit):
        parser.parse_args(["--head.help=Gated"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--head.dim DIM" in shown
    assert line in shown
    assert not any(f"--head.{name}" in shown for name in NOT_OPTIONS)
