"""Heads by their names, for heads that contain others."""

import difflib
from collections.abc import Iterable
from importlib import import_module

from fusion.heads.base import FusionHead
from fusion.rebuilding import named


def head_named(name: str, what: str) -> type[FusionHead]:
    """The class of a head's name in fusion.heads, or of a class path. Raises ValueError, which begins with `what`, for one that is unknown
    or no fusion head. Raises UserError for one whose module must not be imported (fusion.rebuilding.importing_only).

    >>> head_named("Gated", "a head").__name__
    'Gated'
    """
    try:
        found = named(name if "." in name else f"fusion.heads.{name}")
    except (ImportError, AttributeError):
        found = None
    if not (isinstance(found, type) and issubclass(found, FusionHead)):
        heads = import_module("fusion.heads").available()  # not imported above, since it imports the heads that use this
        raise ValueError(f"{what} '{name}'; {nearest_name(name, heads)}; or the class path of a fusion head")
    return found


def nearest_name(name: str, known: Iterable[str]) -> str:
    """
    >>> nearest_name("Gatd", ["Gated", "FiLM"]), nearest_name("x", ["Gated", "FiLM"])
    ('nearest: Gated', 'expected one of Gated, FiLM')
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    return f"nearest: {', '.join(near)}" if near else f"expected one of {', '.join(names)}"
