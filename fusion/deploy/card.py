"""The card of a package: what it is, how it scored, how to ask it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion.predictor import Predictor

USE = {
    "onnx": 'pip install "fusion[edge]"     # ONNX Runtime, tokenizers, NumPy, Pillow; no torch',
    "torch": "pip install fusion torch        # a program of torch.export",
    "aot": "pip install fusion torch        # compiled for x86-64 CPUs with AVX2",
}


def card_of(about: Mapping[str, Any], run: str | Path, predictor: Predictor) -> str:
    """The card as Markdown."""
    inputs = predictor.processor.inputs
    named = {name: {"image": "images", "text": "texts"}.get(name, name) for name in inputs}
    arguments = ", ".join(f"{argument}=[...]" for argument in named.values())
    encoders = ", ".join(f"{name} by {kind}" for name, kind in about["encoders"].items())
    lines = [
        f"# {about['run']}",
        "",
        f"{about['task']} of {' and '.join(f'{name} ({kind.noun})' for name, kind in inputs.items())}, exported by fusion "
        f"{about['fusion']} to {about['to']}.",
        "",
        "```bash",
        USE[about["to"]],
        "```",
        "",
        "```python",
        "import fusion",
        "",
        'model = fusion.load("THIS FOLDER")',
        f"model.predict({arguments}).answers  # None for a missing input",
        "```",
        "",
        f"- head {about['head']}; {encoders}; {about['parameters']:,} parameters",
        f"- values differ from the run's by at most {about['difference']:.1g} on {about['batches']} batches with every pattern of missing "
        "inputs",
        *score_lines(run),
        "",
        "`SHA256SUMS` has the checksums of all files, which are verified when the package is loaded.",
        "",
    ]
    return "\n".join(lines)


def score_lines(run: str | Path) -> list[str]:
    """The run's scores on test, if it has any."""
    path = Path(run).expanduser() / "results.json"
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))["test"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if isinstance(value, float) and "/" not in name)
    return [f"- scores on test: {shown}"] if shown else []
