"""Mistakes in recipes and options, told in one line with the nearest known name.

jsonargparse's messages nest (key, type, union, class, option, ...); the innermost part says what is wrong, the rest is how it was found.
"""

import inspect
import re
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from torch.optim import Optimizer

from fusion.data import Preparer
from fusion.encoders import Encoder
from fusion.errors import nearest
from fusion.heads import FusionHead
from fusion.settings.recipes import Recipe
from fusion.tasks import Task
from fusion.training import Balance, Schedule

# What may stand at these keys.
KINDS: dict[str, type] = {
    "model.head": FusionHead,
    "model.task": Task,
    "model.image": Encoder,
    "model.text": Encoder,
    "model.schedule": Schedule,
    "model.optimizer": Optimizer,
    "model.balance": Balance,
    "data.preparer": Preparer,
    "trainer.callbacks": Callback,
}


REFUSED = re.compile(r"(?:Group|Key|key|Option) ['\"]([\w.]+)['\"]:? (?:does not accept|is not expected|is not accepted|not expected)")
NO_SUCH_KEY = re.compile(r"(?:Group ['\"]([\w.]+)['\"] does not accept )?(?:nested key|No action for key) ['\"]([\w.]+)['\"]")
NO_SUCH_CLASS = re.compile(r"Expected a dot import path string: (\S+)|No module named '?([\w.]+)'?|Import failed for '?([\w.]+)")
NESTED = re.compile(r"Given value: NestedArg\(key='([\w.]+)', val='?([^')]*)")  # an option of a class, given on the command line
PROBLEM = re.compile(r"Problem with given class_path '([\w.]+)': (.*?)(?= - Problem| - Not a valid| - Expected a <class 'NoneType'>|$)")
WRONG_TYPE = re.compile(r"Expected a (?:<class '([\w.]+)'>|(\S+))\.? Got value: (.+?)(?:\.? G(?:iven|ot) value| - Expected|$)")
ONE_OF_TYPES = re.compile(r"Expected (?:a )?<class '(\w+)'>")


def told_plainly(message: str, parser: ArgumentParser, recipes: Sequence[Recipe]) -> str:
    """The mistake behind a message of jsonargparse or OmegaConf."""
    message = " ".join(message.split())
    options = [option.removeprefix("--") for option in parser._option_string_actions if option.startswith("--")]
    known = [option for option in options if not option.endswith((".help", "+"))]
    found = re.search(r"full_key: ([\w.]+)", message) or re.search(r'(?:Parser key "|[Kk]ey ["\'])([\w.]+)', message)
    key = found[1] if found else ""

    if match := re.search(r"unrecognized arguments: --([\w.+-]+)", message):
        return f"unknown option --{match[1]}. {nearest(match[1], known)}"
    if match := re.search(r"Interpolation key '([^']+)' not found", message):
        return f"{key}: there is no '{match[1]}' to put in its place. {nearest(match[1], known)}{place(key, match[1], recipes)}"
    if match := NO_SUCH_KEY.search(message):
        unknown = f"{match[1]}.{match[2]}" if match[1] else match[2]
        return f"unknown key '{unknown}'. {nearest(unknown, known)}{place(unknown, '', recipes)}"
    if (match := PROBLEM.search(message)) and not REFUSED.search(match[2]):  # the first of a union's: of the class that was named
        name, problem = match[1].rpartition(".")[2], match[2]
        if missing := re.search(r"the following arguments are required: (.+)", problem):
            return f"{key}: {name} needs {missing[1]}{place(key, name, recipes)}"
        if (inner := re.search(r'Parser key "([\w.]+)"', problem)) and (unfit := WRONG_TYPE.search(problem)):
            return f"{key}.init_args.{inner[1]}: expected {unfit[1] or unfit[2]}, got {unfit[3]}{place(key, unfit[3], recipes)}"
    if match := REFUSED.search(message):
        cls = class_named(message, key)
        if cls is not None:
            option = match[1].split(".")[0]
            if f"<class '{cls.__module__}.{cls.__qualname__}'>" in message:  # the kind that may stand there: none of it was named
                return no_class(key, option)
            return f"{key}: {cls.__name__} has no option '{option}'. {nearest(option, options_of(cls))}{place(key, option, recipes)}"
        return f"unknown key '{match[1]}'. {nearest(match[1], known)}{place(match[1], '', recipes)}"
    if (match := NO_SUCH_CLASS.search(message)) and key in KINDS:
        wrong = next(name for name in match.groups() if name)
        return f"{key}: unknown '{wrong}'. {nearest(wrong.split('.')[-1], names_of(KINDS[key]))}{place(key, wrong, recipes)}"
    nested = NESTED.search(message)
    if nested and "class_path" not in message:
        return no_class(key, nested[1])
    if nested:
        key = f"{key}.init_args.{nested[1]}"
    if match := WRONG_TYPE.search(message):
        return f"{key}: expected {match[1] or match[2]}, got {match[3]}{place(key, match[3], recipes)}"
    if (match := nested or re.search(r"Given value: ()(\S+)", message)) and (allowed := re.findall(r"Literal\[([^]]*)\]", message)):
        values = [value.strip(" '") for group in allowed for value in group.split(",")]
        return f"{key}: {match[2]} is not one of them. {nearest(match[2], values)}{place(key, match[2], recipes)}"
    if (types := ONE_OF_TYPES.findall(message)) and (match := re.search(r"Given value: (.+)$", message)):
        expected = " or ".join("null" if name == "NoneType" else name for name in dict.fromkeys(types))
        return f"{key}: expected {expected}, got {match[1]}{place(key, match[1], recipes)}"
    return message


def rejected_by_constructor(message: str) -> str:
    """What a class said of its arguments, from a message of jsonargparse about a union of which it is one."""
    reason = re.search(r"Union subtypes .*? Errors: - (.+?) - Not a valid subclass of ", message)
    cls = re.search(r"Given value: .*?class_path='[\w.]*?(\w+)'", message)
    return f"{cls[1]}: {reason[1]}" if reason and cls else message


def no_class(key: str, option: str) -> str:
    """An option for what is not there."""
    known = f" ({', '.join(names_of(KINDS[key]))})" if key in KINDS else ""
    return f"{key}: no class was named that '{option}' could be for. Name one first, by --{key}=CLASS{known} or by a recipe"


def class_named(message: str, key: str) -> type | None:
    """The class whose option was refused, from the message's class_path."""
    match = re.search(r"class_path[= ]'([\w.]+)'", message)
    if not match or not key:
        return None
    module, _, name = match[1].rpartition(".")
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError):
        return None
    return cls if isinstance(cls, type) else None


def options_of(cls: type) -> list[str]:
    """The options of a class's constructor: what recipes may set (a head's dims and out_dim come from the encoders and the data)."""
    return [name for name in inspect.signature(cls).parameters if name not in ("dims", "out_dim", "params", "self")]


def names_of(base: type) -> list[str]:
    """The usable subclasses of a class, by name."""
    direct: list[type] = base.__subclasses__()
    below = [cls for child in direct for cls in (child, *child.__subclasses__())]
    return [cls.__name__ for cls in below if not inspect.isabstract(cls) and not cls.__name__.startswith("_")]


def place(key: str, wrong: str, recipes: Sequence[Recipe]) -> str:
    """In which recipe the mistake stands, if in any: the last that sets the key to something with these words in it."""
    for recipe in reversed(recipes):
        inside: Any = recipe.settings
        for part in key.split("."):
            inside = inside.get(part) if isinstance(inside, dict) else None
        if inside is not None and wrong in str(inside):
            return f" (in {recipe.path})"
    return ""
