"""Paths of this machine in settings, which are not shared."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOCAL_PATH = re.compile(r"[/~\\]\S|\.{1,2}[/\\]|[A-Za-z]:[/\\]|file:|local-dir:")


def is_local(text: str) -> bool:
    """Whether a setting is a path on this machine: one by its form, or that of an existing file or folder."""
    return bool(LOCAL_PATH.match(text)) or (len(text) > 1 and any(sign in text for sign in "/\\") and Path(text).exists())


def base_name(text: str) -> str:
    """A path's last part; other texts as they are.

    >>> base_name("/home/ada/shoes.csv"), base_name("C:\\\\data\\\\shoes.csv"), base_name("timm/resnet18")
    ('shoes.csv', 'shoes.csv', 'timm/resnet18')
    """
    return re.split(r"[/\\]", text.rstrip("/\\"))[-1] if is_local(text) else text


def without_paths(value: Any) -> Any:
    """Plain data, with the last part alone of all local paths in it.

    >>> without_paths({"manifest": "/home/ada/shoes.csv", "batch_size": 8, "callbacks": ["~/x"]})
    {'manifest': 'shoes.csv', 'batch_size': 8, 'callbacks': ['x']}
    """
    if isinstance(value, Mapping):
        return {key: without_paths(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_paths(one) for one in value]
    return base_name(value) if isinstance(value, str) else value
