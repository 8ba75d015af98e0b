"""Objects as plain data: a class's name and its arguments, and back."""

import inspect
from importlib import import_module
from typing import Any, Self

from fusion.errors import UserError


class Rebuildable:
    """Remembers what its constructor was given (plain data), and with what it learnt since is written as plain data and made again."""

    init_args: dict[str, Any]

    def __new__(cls, *args: Any, **options: Any) -> Self:
        thing = super().__new__(cls)
        names = list(inspect.signature(cls.__init__).parameters)[1:]
        thing.__dict__["init_args"] = dict(zip(names, args, strict=False)) | options
        return thing

    def learnt(self) -> dict[str, Any]:
        """What was found out since it was constructed, as plain data."""
        raise NotImplementedError

    def set_learnt(self, learnt: dict[str, Any]) -> None:
        """Take what `learnt` gave."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Plain data from which `from_state` makes the same."""
        name = f"{type(self).__module__}.{type(self).__qualname__}"
        return {"class": name, "init": dict(self.init_args), "learnt": self.learnt()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """Raises UserError for a class that can't be imported, or is no subclass of this one."""
        made: Self = rebuilt(state, cls)
        made.set_learnt(state["learnt"])
        return made


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
    """What a class and its arguments make. Raises UserError as `class_of`."""
    return class_of(spec, base)(**spec["init"])
