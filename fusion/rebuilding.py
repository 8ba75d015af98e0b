"""Objects as plain data: a class's name and its arguments, and back."""

import inspect
from importlib import import_module
from typing import Any, Self

from fusion.errors import UserError


class Rebuildable:
    """Remembers what its constructor was given, in `init_args`: if that is plain data, `rebuilt(thing.made_by(), base)` makes its equal."""

    init_args: dict[str, Any]

    def __new__(cls, *args: Any, **options: Any) -> Self:
        thing = super().__new__(cls)
        names = list(inspect.signature(cls.__init__).parameters)[1:]
        thing.__dict__["init_args"] = dict(zip(names, args, strict=False)) | options
        return thing

    def made_by(self) -> dict[str, Any]:
        """Its class and the constructor's arguments."""
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}", "init": dict(self.init_args)}


def class_of(spec: dict[str, Any], base: type) -> Any:
    """The class that a checkpoint names, if it is one of the kind expected. Raises UserError where it isn't, or can't be imported."""
    module, _, name = spec["class"].rpartition(".")
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"the checkpoint needs {spec['class']}, which can't be imported here ({error})") from error
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise UserError(f"the checkpoint names {spec['class']} as its {base.__name__}, which it is not")
    return cls


def rebuilt(spec: dict[str, Any], base: type) -> Any:
    """What `made_by` says. Raises UserError as `class_of`."""
    return class_of(spec, base)(**spec["init"])
