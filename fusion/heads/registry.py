"""What heads there are, and what each of them is, as their own docstrings say."""

import difflib
import inspect
import re
from fnmatch import fnmatchcase
from typing import NamedTuple, get_args

from fusion.heads import all_heads
from fusion.heads.base import Family, FusionHead

HEADS: dict[str, type[FusionHead]] = {name: head for name, head in vars(all_heads).items() if isinstance(head, type)}


class HeadInfo(NamedTuple):
    """What `describe` tells of a head; texts as in its docstring.

    most_modalities: None where the method takes any number.
    """

    name: str
    family: str
    stage: str
    idea: str
    source: str
    reads: str
    cost: str
    most_modalities: int | None


def available(pattern: str = "*", *, family: Family | None = None) -> list[str]:
    """The names of the heads that match a pattern (as file names do) and belong to a family: early, intermediate, late, cross-attention.

    >>> available("Low*")
    ['LowRankTensor']
    >>> available(family="early")
    ['JointTransformer']
    """
    if family is not None and family not in get_args(Family):
        raise ValueError(f"unknown family '{family}'; expected one of {', '.join(get_args(Family))}")
    return [name for name, head in HEADS.items() if fnmatchcase(name, pattern) and family in (None, head.family)]


def describe(name: str) -> HeadInfo:
    """What a head is. Raises ValueError for an unknown one, with the nearest known.

    >>> describe("LowRankTensor").source
    'Liu et al. (2018), "Efficient Low-rank Multimodal Fusion with Modality-Specific Factors" (LMF).'
    """
    if name not in HEADS:
        near = difflib.get_close_matches(name, HEADS, n=3, cutoff=0.4)
        hint = f"nearest: {', '.join(near)}" if near else f"there are {', '.join(HEADS)}"
        raise ValueError(f"unknown head '{name}'; {hint}")
    head = HEADS[name]
    text = inspect.getdoc(head) or ""  # none under python -OO
    return HeadInfo(
        name,
        head.family,
        head.stage,
        one_line(text.partition("\n\n")[0]),
        said(text, "Source"),
        said(text, "Reads"),
        said(text, "Cost"),
        head.most_modalities,
    )


def said(text: str, what: str) -> str:
    """What a docstring says after "what:", until the next of these words, an empty line or the end."""
    found = re.search(rf"^{what}: (.*?)(?=^(?:Source|Reads|Cost): |^\s*$|\Z)", text, re.MULTILINE | re.DOTALL)
    return one_line(found[1]) if found else ""


def one_line(text: str) -> str:
    return " ".join(text.split())
