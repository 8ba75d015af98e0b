"""Registry of the heads, with descriptions taken from their docstrings."""

import inspect
import re
from fnmatch import fnmatchcase
from typing import NamedTuple, get_args

from fusion.heads import all_heads
from fusion.heads.base import Family, FusionHead
from fusion.heads.by_name import nearest_name

HEADS: dict[str, type[FusionHead]] = {name: head for name, head in vars(all_heads).items() if isinstance(head, type)}


class HeadInfo(NamedTuple):
    """Description of a head; texts as in its docstring.

    most_modalities: None if the method accepts any number.
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
    """Names of the heads that match a shell-style pattern and belong to a family: early, intermediate, late, cross-attention.

    >>> available("Low*")
    ['LowRankTensor']
    >>> available(family="early")
    ['JointTransformer']
    """
    if family is not None and family not in get_args(Family):
        raise ValueError(f"unknown family '{family}'; expected one of {', '.join(get_args(Family))}")
    return [name for name, head in HEADS.items() if fnmatchcase(name, pattern) and family in (None, head.family)]


def describe(name: str) -> HeadInfo:
    """Returns the description of a head. Raises ValueError for an unknown name, with the nearest known ones.

    >>> describe("LowRankTensor").source
    'Liu et al. (2018), "Efficient Low-rank Multimodal Fusion with Modality-Specific Factors" (LMF).'
    """
    if name not in HEADS:
        raise ValueError(f"unknown head '{name}'; {nearest_name(name, HEADS)}")
    head = HEADS[name]
    text = inspect.getdoc(head) or ""  # there are no docstrings under python -OO
    return HeadInfo(
        name,
        head.family,
        head.stage,
        one_line(text.partition("\n\n")[0]),
        entry(text, "Source"),
        entry(text, "Reads"),
        entry(text, "Cost"),
        head.most_modalities,
    )


def entry(text: str, key: str) -> str:
    """The text after "key:" in a docstring, up to the next key, an empty line or the end."""
    match = re.search(rf"^{key}: (.*?)(?=^(?:Source|Reads|Cost): |^\s*$|\Z)", text, re.MULTILINE | re.DOTALL)
    return one_line(match[1]) if match else ""


def one_line(text: str) -> str:
    return " ".join(text.split())
