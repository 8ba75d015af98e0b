"""Small places: packages where torch is not installed, and what is said where something is missing."""

import subprocess
import sys
import time
import tomllib
import venv
from pathlib import Path

import pytest

from fusion.errors import UserError
from fusion.extras import EXTRAS, installed

REPOSITORY = Path(__file__).parents[2]


def test_a_package_that_is_not_installed_is_named_with_its_extra() -> None:
    with (
        pytest.raises(
            UserError, match=r"fusion fit needs torch, which is not installed: pip install torch, or fusion with its extra train"
        ),
        installed("fusion fit"),
    ):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    with pytest.raises(ModuleNotFoundError), installed("fusion fit"):  # a bug of ours keeps its traceback
        raise ModuleNotFoundError("No module named 'fusion.nothing'", name="fusion.nothing")


def test_every_extra_that_is_named_exists() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(EXTRAS.values()) <= set(project["optional-dependencies"])
    assert [one.partition(">")[0] for one in project["dependencies"]] == ["numpy", "pillow"]


@pytest.mark.parametrize("words", [["fit", "--recipe", "quickstart"], ["predict", "--run", "r", "--manifest", "m"]])
def test_a_command_without_torch_says_what_to_install(words: list[str]) -> None:
    script = (
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'lightning', 'pyarrow', 'transformers'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "from fusion.cli.main import main\n"
        f"main({words!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: fusion {words[0]} needs ")
    assert done.stderr.endswith("fusion with its extra train\n")


@pytest.mark.slow
def test_a_fresh_environment_for_packages_is_small_and_answers_soon(tmp_path: Path) -> None:
    from test_export import graph, of

    from fusion.deploy.exporting import write_graph
    from fusion.packages.folder import FORMAT, PACKAGE, PROCESSOR, new_folder, write_json
    from fusion.processing.answers import state_of

    exported = graph(of("CrossAttention"))
    with new_folder(tmp_path / "package") as folder:
        write_graph(exported, "onnx", folder / "model.onnx")
        inputs = {name: {"form": one.form, **one.state()} for name, one in exported.preprocessors.items()}
        write_json(folder / PROCESSOR, {"inputs": inputs, "answers": state_of(exported.task.answering())})
        write_json(folder / PACKAGE, {"format": FORMAT, "to": "onnx", "graph_inputs": exported.names, "width": 3})
    venv.create(tmp_path / "edge", with_pip=True)
    python = tmp_path / "edge" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-compile", f"{REPOSITORY}[edge]"], check=True, timeout=280)
    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "pip"], check=True, timeout=60)
    installed_bytes = sum(path.stat().st_size for path in (tmp_path / "edge").rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert installed_bytes < 200 * 10**6
    script = (
        "import sys, fusion\n"
        f"answer = fusion.load({str(tmp_path / 'package')!r}).predict(images=[None], texts=['a blue square'])\n"
        "assert not {'torch', 'pyarrow', 'transformers', 'lightning'} & set(sys.modules)\n"
        "print(answer.answers[0])\n"
    )
    times = []
    for _ in range(3):
        start = time.monotonic()
        done = subprocess.run([python, "-c", script], capture_output=True, text=True, timeout=60, cwd=tmp_path)
        times.append(time.monotonic() - start)
        assert done.stdout.strip() in ("a", "b", "c"), done.stderr
    print(f"{installed_bytes / 10**6:.0f} MB installed, {min(times):.2f} s to the first answer")
    assert min(times) < 1.0
