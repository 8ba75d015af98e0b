"""Heads can be taken into any project: they load torch and nothing above it."""

import subprocess
import sys

HEAVY = ("lightning", "timm", "transformers", "torchvision", "torchmetrics")


def test_importing_the_heads_loads_no_library_above_torch() -> None:
    program = f"import sys, fusion.heads; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
