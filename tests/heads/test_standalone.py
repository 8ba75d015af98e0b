"""Heads can be taken into any project: they load torch and nothing above it."""

import os
import subprocess
import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

HEAVY = ("lightning", "timm", "transformers", "torchvision", "torchmetrics")
ROOT = Path(__file__).parents[2]


def test_importing_the_heads_loads_no_library_above_torch() -> None:
    program = f"import sys, fusion.heads; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


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
def test_the_wheel_installed_without_dependencies_trains_a_head_beside_torch_alone(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    alone = tmp_path / "alone"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(alone), str(wheel)], check=True)
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
