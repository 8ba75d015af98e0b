"""The pretrained models that encoders started from, and their licences."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import yaml
from huggingface_hub import try_to_load_from_cache

from fusion.deploy.local_paths import is_local

UNKNOWN = "unknown"


class Base(NamedTuple):
    """The pretrained model that an encoder started from: its name on a hub, and its licence."""

    name: str
    licence: str


def pretrained_bases(recipe: Mapping[str, Any], names: Sequence[str], look_up: Callable[[str], str | None]) -> dict[str, Base | None]:
    """By input, the pretrained model on a hub that its encoder started from.

    Args:
        recipe: the run's settings.
        names: of the inputs.
        look_up: the licence of a model of the hub where no local metadata states it; None if it isn't known.
    """
    bases: dict[str, Base | None] = {}
    for name in names:
        settings = encoder_settings(recipe, name)
        options, kind = settings.get("init_args") or {}, str(settings.get("class_path") or "").rpartition(".")[2]
        source = options.get("name" if kind == "TimmImage" else "name_or_path")
        known = kind in ("TimmImage", "TransformersText", "PairImage", "PairText")
        if not known or not source or not options.get("pretrained", True) or is_local(source):
            bases[name] = None
        elif kind == "TimmImage" and ":" not in source:
            bases[name] = timm_base(source)
        else:
            repository = (source.partition(":")[2] or source).partition("@")[0]
            bases[name] = Base(repository, cached_licence(repository) or look_up(repository) or UNKNOWN)
    return bases


def timm_base(name: str) -> Base:
    """What timm says of a model of its own: its name on the hub, and its licence."""
    config: Any = timm.get_pretrained_cfg(name)
    return Base(getattr(config, "hf_hub_id", None) or f"timm/{name}", getattr(config, "license", None) or UNKNOWN)


def cached_licence(repository: str) -> str | None:
    """The licence in a model card that the client has in its cache."""
    path = try_to_load_from_cache(repository, "README.md")
    if not isinstance(path, str):
        return None
    found = re.match(r"---\n(.*?)\n---", Path(path).read_text(encoding="utf-8"), re.DOTALL)
    licence = (yaml.safe_load(found[1]) or {}).get("license") if found else None
    return licence if isinstance(licence, str) else None


def encoder_settings(recipe: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    model = recipe.get("model") or {}
    return (model.get("encoders") or {}).get(name) or (model.get(name) if name in ("image", "text") else None) or {}
