"""Converts objects to plain data (a class's name and its arguments), and back."""

import inspect
from importlib import import_module
from typing import Any, Self

from fusion.errors import UserError


class Rebuildable:
    """Records its constructor's arguments (plain data), so that it can be saved with its learnt state as plain data, and rebuilt."""

    init_args: dict[str, Any]

    def __new__(cls, *args: Any, **options: Any) -> Self:
        instance = super().__new__(cls)
        names = list(inspect.signature(cls.__init__).parameters)[1:]
        instance.__dict__["init_args"] = dict(zip(names, args, strict=False)) | options
        return instance

    def learnt(self) -> dict[str, Any]:
        """The state learnt since construction, as plain data."""
        raise NotImplementedError

    def set_learnt(self, learnt: dict[str, Any]) -> None:
        """Restore the state that `learnt` returned."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Plain data from which `from_state` rebuilds an equal object."""
        name = f"{type(self).__module__}.{type(self).__qualname__}"
        return {"class": name, "init": dict(self.init_args), "learnt": self.learnt()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """Rebuilds an object from its state. Raises UserError for a class that can't be imported, or is no subclass of this one."""
        instance: Self = rebuilt(state, cls)
        instance.set_learnt(state["learnt"])
        return instance


def class_of(spec: dict[str, Any], base: type) -> Any:
    """The class that a checkpoint names. Raises UserError if it can't be imported, or is no subclass of `base`."""
    module, _, name = spec["class"].rpartition(".")
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"the checkpoint needs {spec['class']}, which can't be imported here ({error})") from error
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise UserError(f"the checkpoint names {spec['class']} as its {base.__name__}, but it is no {base.__name__}")
    return cls


def rebuilt(spec: dict[str, Any], base: type) -> Any:
    """The object of a class and its arguments. Raises UserError as `class_of` does."""
    return class_of(spec, base)(**spec["init"])
