"""Heads can be taken into any project: they load torch and nothing above it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("lightning", "timm", "transformers", "torchvision", "torchmetrics")
HIDDEN = (
    *HEAVY,
    *("tokenizers", "omegaconf", "jsonargparse", "PIL", "pyarrow", "tensorboard", "tqdm", "yaml", "safetensors", "huggingface_hub"),
)
ROOT = Path(__file__).parents[2]


def test_importing_the_heads_loads_no_library_above_torch() -> None:
    program = f"import sys, fusion.heads; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_wheel_installed_without_dependencies_trains_a_head_beside_torch_alone(tmp_path: Path) -> None:
    """Every library that is neither torch nor one of torch's own needs is hidden from the interpreter."""
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(tmp_path / "installed"), str(wheel)], check=True)
    program = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HIDDEN}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
import torch, fusion.heads
assert fusion.heads.__file__.startswith({str(tmp_path)!r})
torch.manual_seed(0)
head = fusion.heads.CrossAttention({{"text": 4, "image": 6}}, 2, dim=16, num_heads=2)
optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
for step in range(150):
    bits = torch.randint(0, 2, (64, 2))
    features = {{m: (2.0 * bits[:, i, None, None] - 1).expand(64, 3, d) for i, (m, d) in enumerate(head.dims.items())}}
    loss = torch.nn.functional.cross_entropy(head(features).output, bits[:, 0] ^ bits[:, 1])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(float(loss))
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.1  # XOR, learnt
