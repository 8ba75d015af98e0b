"""The built wheel, installed apart from the checkout: recipes and generator come with it, and the heads stand alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = ["--data.preparer.scenes=150", "--data.preparer.questions_per_scene=4", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]


@pytest.mark.slow
def test_the_wheel_trains_quickstart_in_an_empty_folder(tmp_path: Path) -> None:
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(installed), str(wheel)], check=True)
    environment = os.environ | {"PYTHONPATH": str(installed), "FUSION_CACHE": str(tmp_path / "cache")}

    def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", code, *arguments]
        return subprocess.run(words, cwd=empty, env=environment, capture_output=True, text=True, timeout=280, check=False)

    where = python("import fusion; print(fusion.__file__)").stdout
    assert where.startswith(str(installed))
    done = python("from fusion.cli import main; main()", "fit", "--recipe", "quickstart", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "this model" in done.stdout
    assert (empty / "runs" / "quickstart").is_dir()
    assert "easy_vqa" in python("from fusion.cli.recipes import recipe_names; print(recipe_names())").stdout
