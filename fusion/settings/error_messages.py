"""Error messages for recipes and options: one line that names the nearest known name.

jsonargparse nests its messages (key, type, union, class, option, ...); the innermost part says what is wrong, the rest is its context.
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

# The base class of the values of these keys.
BASES: dict[str, type] = {
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


REJECTED = re.compile(r"(?:Group|Key|key|Option) ['\"]([\w.]+)['\"]:? (?:does not accept|is not expected|is not accepted|not expected)")
NO_SUCH_KEY = re.compile(r"(?:Group ['\"]([\w.]+)['\"] does not accept )?(?:nested key|No action for key) ['\"]([\w.]+)['\"]")
NO_SUCH_CLASS = re.compile(r"Expected a dot import path string: (\S+)|No module named '?([\w.]+)'?|Import failed for '?([\w.]+)")
NESTED = re.compile(r"Given value: NestedArg\(key='([\w.]+)', val='?([^')]*)")  # an option of a class, given on the command line
PROBLEM = re.compile(r"Problem with given class_path '([\w.]+)': (.*?)(?= - Problem| - Not a valid| - Expected a <class 'NoneType'>|$)")
WRONG_TYPE = re.compile(r"Expected a (?:<class '([\w.]+)'>|(\S+))\.? Got value: (.+?)(?:\.? G(?:iven|ot) value| - Expected|$)")
ONE_OF_TYPES = re.compile(r"Expected (?:a )?<class '(\w+)'>")


def plain_message(message: str, parser: ArgumentParser, recipes: Sequence[Recipe]) -> str:
    """The one-line message for an error message of jsonargparse or OmegaConf."""
    message = " ".join(message.split())
    options = [option.removeprefix("--") for option in parser._option_string_actions if option.startswith("--")]
    known = [option for option in options if not option.endswith((".help", "+"))]
    key_match = re.search(r"full_key: ([\w.]+)", message) or re.search(r'(?:Parser key "|[Kk]ey ["\'])([\w.]+)', message)
    key = key_match[1] if key_match else ""

    if match := re.search(r"unrecognized arguments: --([\w.+-]+)", message):
        return f"unknown option --{match[1]}. {nearest(match[1], known)}"
    if match := re.search(r"Interpolation key '([^']+)' not found", message):
        return f"{key}: '{match[1]}', to which it refers, does not exist. {nearest(match[1], known)}{place(key, match[1], recipes)}"
    if match := NO_SUCH_KEY.search(message):
        unknown = f"{match[1]}.{match[2]}" if match[1] else match[2]
        return f"unknown key '{unknown}'. {nearest(unknown, known)}{place(unknown, '', recipes)}"
    if (match := PROBLEM.search(message)) and not REJECTED.search(match[2]):  # a union's first: that of the named class
        name, problem = match[1].rpartition(".")[2], match[2]
        if missing := re.search(r"the following arguments are required: (.+)", problem):
            return f"{key}: {name} needs {missing[1]}{place(key, name, recipes)}"
        if (inner := re.search(r'Parser key "([\w.]+)"', problem)) and (unfit := WRONG_TYPE.search(problem)):
            return f"{key}.init_args.{inner[1]}: expected {unfit[1] or unfit[2]}, got {unfit[3]}{place(key, unfit[3], recipes)}"
    if match := REJECTED.search(message):
        cls = class_named(message, key)
        if cls is not None:
            option = match[1].split(".")[0]
            if f"<class '{cls.__module__}.{cls.__qualname__}'>" in message:  # the base class itself: no class was named
                return no_class(key, option)
            return f"{key}: {cls.__name__} has no option '{option}'. {nearest(option, options_of(cls))}{place(key, option, recipes)}"
        return f"unknown key '{match[1]}'. {nearest(match[1], known)}{place(match[1], '', recipes)}"
    if (match := NO_SUCH_CLASS.search(message)) and key in BASES:
        wrong = next(name for name in match.groups() if name)
        return f"{key}: unknown '{wrong}'. {nearest(wrong.split('.')[-1], names_of(BASES[key]))}{place(key, wrong, recipes)}"
    nested = NESTED.search(message)
    if nested and "class_path" not in message:
        return no_class(key, nested[1])
    if nested:
        key = f"{key}.init_args.{nested[1]}"
    if match := WRONG_TYPE.search(message):
        return f"{key}: expected {match[1] or match[2]}, got {match[3]}{place(key, match[3], recipes)}"
    if (match := nested or re.search(r"Given value: ()(\S+)", message)) and (allowed := re.findall(r"Literal\[([^]]*)\]", message)):
        values = [value.strip(" '") for group in allowed for value in group.split(",")]
        return f"{key}: unknown value {match[2]}. {nearest(match[2], values)}{place(key, match[2], recipes)}"
    if (types := ONE_OF_TYPES.findall(message)) and (match := re.search(r"Given value: (.+)$", message)):
        expected = " or ".join("null" if name == "NoneType" else name for name in dict.fromkeys(types))
        return f"{key}: expected {expected}, got {match[1]}{place(key, match[1], recipes)}"
    return message


def rejected_by_constructor(message: str) -> str:
    """The error raised by a class's constructor, extracted from jsonargparse's message about a union of types."""
    reason = re.search(r"Union subtypes .*? Errors: - (.+?) - Not a valid subclass of ", message)
    cls = re.search(r"Given value: .*?class_path='[\w.]*?(\w+)'", message)
    return f"{cls[1]}: {reason[1]}" if reason and cls else message


def no_class(key: str, option: str) -> str:
    """The message for an option of a class that was not named."""
    known = f" ({', '.join(names_of(BASES[key]))})" if key in BASES else ""
    return f"{key}: '{option}' needs a class, and none was named. Name one first, with --{key}=CLASS{known} or in a recipe"


def class_named(message: str, key: str) -> type | None:
    """The class whose option was rejected, from the message's class_path."""
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
    """The constructor arguments that recipes may set (a head's dims and out_dim come from the encoders and the data)."""
    return [name for name in inspect.signature(cls).parameters if name not in ("dims", "out_dim", "params", "self")]


def names_of(base: type) -> list[str]:
    """The names of the concrete, public subclasses of a class."""
    direct: list[type] = base.__subclasses__()
    below = [cls for child in direct for cls in (child, *child.__subclasses__())]
    return [cls.__name__ for cls in below if not inspect.isabstract(cls) and not cls.__name__.startswith("_")]


def place(key: str, wrong: str, recipes: Sequence[Recipe]) -> str:
    """Where the mistake is: the last recipe that sets the key to a value containing `wrong`; "" if there is none."""
    for recipe in reversed(recipes):
        inside: Any = recipe.settings
        for part in key.split("."):
            inside = inside.get(part) if isinstance(inside, dict) else None
        if inside is not None and wrong in str(inside):
            return f" (in {recipe.path})"
    return ""
