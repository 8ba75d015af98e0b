"""A tiny world for the commands: little data, a small model, seconds a run."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import ROOT, TINY, Run


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to work in, with the data cache that all commands share."""
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="session")
def command(world: Path) -> Run:
    """Runs scripts/NAME.py with arguments in the world, and gives what it printed."""

    def run(name: str, *arguments: str, timeout: float = 280) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"FUSION_CACHE": str(world / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        words = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *arguments]
        return subprocess.run(words, cwd=world, env=environment, capture_output=True, text=True, timeout=timeout, check=False)

    return run


@pytest.fixture(scope="session")
def trained(command: Run, world: Path) -> Path:
    """A run folder, trained for one short epoch."""
    done = command("fit", *TINY)
    assert done.returncode == 0, done.stderr
    return next((world / "runs" / "quickstart").iterdir())


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """As `command`, in this process, which has everything loaded."""
    from fusion.cli.main import run

    def call(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(world)
        monkeypatch.setenv("FUSION_CACHE", str(world / "cache"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run(name, list(arguments))
        return subprocess.CompletedProcess([name, *arguments], int(ended.value.code or 0), *capsys.readouterr())

    return call


@pytest.fixture
def in_process(here: Run) -> Callable[[str, list[str]], tuple[int, str]]:
    """Runs a command in this process; gives its exit status and what it wrote to standard error. For mistakes, which end early."""

    def call(name: str, arguments: list[str]) -> tuple[int, str]:
        done = here(name, *arguments)
        return done.returncode, done.stderr

    return call
