"""The built wheel, installed apart from the checkout: recipes and generator come with it, and the heads stand alone."""

import os
import subprocess
import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
SMALL = ["--data.preparer.scenes=150", "--data.preparer.questions_per_scene=4", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]


PIP = [sys.executable, "-m", "pip", "--quiet"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([*PIP, "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT)], check=True)
    (built,) = folder.glob("*.whl")
    return built


def install(wheel: Path, target: Path) -> None:
    subprocess.run([*PIP, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)


@pytest.mark.slow
def test_the_wheel_trains_quickstart_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    install(wheel, installed)
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
    assert "easy_vqa" in python("from fusion.settings.recipes import recipe_names; print(recipe_names())").stdout


def needed(name: str, found: dict[str, Distribution] | None = None) -> dict[str, Distribution]:
    """An installed distribution and all that it requires here, by name."""
    found = {} if found is None else found
    for requirement in [name] if not found else (found[name].requires or []):
        plain = Requirement(requirement)
        if plain.name not in found and (plain.marker is None or plain.marker.evaluate({"extra": ""})):
            found[plain.name] = distribution(plain.name)
            needed(plain.name, found)
    return found


@pytest.mark.slow
def test_the_wheel_installed_without_dependencies_trains_a_head_beside_torch_alone(wheel: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    install(wheel, alone)
    for installed in needed("torch").values():
        for top in {file.parts[0] for file in installed.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (alone / top).exists():
                (alone / top).symlink_to(installed.locate_file(top))
    program = """
import torch, fusion.heads
torch.manual_seed(0)
head = fusion.heads.CrossAttention({"text": 4, "image": 6}, 2, dim=16, num_heads=2)
optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
for step in range(150):
    bits = torch.randint(0, 2, (64, 2))
    features = {m: torch.randn(64, 3, d) / 5 for m, d in head.dims.items()}
    for tokens, bit in zip(features.values(), bits.T):
        tokens[..., 0] += 2.0 * bit[:, None] - 1
    loss = torch.nn.functional.cross_entropy(head(features).output, bits[:, 0] ^ bits[:, 1])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(fusion.heads.__file__, float(loss))
"""

    def python(code: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(alone)}  # -S: nothing of the environment that the tests run in
        words = [sys.executable, "-S", "-c", code]
        return subprocess.run(words, capture_output=True, text=True, timeout=200, check=False, env=environment, cwd=tmp_path)

    assert "ModuleNotFoundError" in python("import lightning").stderr
    done = python(program)
    assert done.returncode == 0, done.stderr
    where, loss = done.stdout.split()
    assert where.startswith(str(alone))
    assert float(loss) < 0.1  # XOR, learnt
