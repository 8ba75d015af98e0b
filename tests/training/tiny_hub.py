"""A Hugging Face cache made up in a folder, from which the real loading code reads by hub name, offline."""

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

COMMIT = "0" * 40


def into_cache(folder: Path, hub: Path, name: str) -> None:
    """Puts a folder of a model into the cache `hub` as the repository `name`."""
    home = hub / ("models--" + name.replace("/", "--"))
    shutil.copytree(folder, home / "snapshots" / COMMIT)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)


def go_offline(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_HUB_OFFLINE=1 with HF_HUB_CACHE would, had they been set before the libraries were loaded."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
