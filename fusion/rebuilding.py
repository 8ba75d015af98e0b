"""Converts objects to plain data (a class's name and its arguments), and back."""

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any, Self

from fusion.errors import UserError

TRUSTED: ContextVar[tuple[str, ...] | None] = ContextVar("TRUSTED", default=None)  # packages that may be imported; None: any


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
    try:
        cls = named(spec["class"])
    except (ImportError, AttributeError) as error:
        raise UserError(f"the checkpoint needs {spec['class']}, which can't be imported here ({error})") from error
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise UserError(f"the checkpoint names {spec['class']} as its {base.__name__}, but it is no {base.__name__}")
    return cls


def rebuilt(spec: dict[str, Any], base: type) -> Any:
    """The object of a class and its arguments. Raises UserError as `class_of` does."""
    return class_of(spec, base)(**spec["init"])


@contextmanager
def importing_only(packages: Sequence[str] | None) -> Iterator[None]:
    """Within this context, `named` imports nothing outside fusion and these packages: to import a module executes its code, and a file from
    a hub could name any.

    Args:
        packages: names of packages or modules; None: anything may be imported.
    """
    token = TRUSTED.set(None if packages is None else ("fusion", *packages))
    try:
        yield
    finally:
        TRUSTED.reset(token)


def named(path: str) -> Any:
    """What a dotted path names: an attribute of a module, which is imported if need be.

    Raises ImportError or AttributeError if there is none, and within `importing_only` UserError for a module that is neither trusted nor
    imported already.

    >>> named("fusion.errors.UserError").__name__
    'UserError'
    """
    module, _, name = path.rpartition(".")
    if not module or module.startswith("."):
        raise ImportError(f"'{path}' is no dotted path")
    trusted = TRUSTED.get()
    if trusted is None or any(module == package or module.startswith(f"{package}.") for package in trusted):
        return getattr(import_module(module), name)
    if module not in sys.modules:
        raise UserError(
            f"{path} is not part of fusion: a model from elsewhere imports no other module, since that executes its code. If you trust "
            f"it, import {module} before, or load with trusted=['{module.partition('.')[0]}']"
        )
    try:
        return vars(sys.modules[module])[name]  # getattr could import more
    except KeyError:
        raise AttributeError(f"module '{module}' has no attribute '{name}'") from None
