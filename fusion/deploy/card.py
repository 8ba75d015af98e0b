"""The card of a package: what it is, how it scored, how to ask it."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fusion.predictor import Predictor

USE = {
    "onnx": 'pip install "REPOSITORY_OF_FUSION[edge]"        # ONNX Runtime, tokenizers, NumPy, Pillow; no torch',
    "torch": 'pip install "REPOSITORY_OF_FUSION[edge]" torch  # a program of torch.export: load only what you trust',
    "aot": 'pip install "REPOSITORY_OF_FUSION[edge]" torch  # compiled for x86-64 CPUs with AVX2: load only what you trust',
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
        *parity_lines(about),
        *score_lines(run, predictor.processor.task.headline.values()),
        "",
        "`SHA256SUMS` has the checksums of all files, which are verified when the package is loaded.",
        "",
    ]
    return "\n".join(lines)


def parity_lines(about: Mapping[str, Any]) -> list[str]:
    """How far the package's values are from the run's."""
    if "int8" not in about:
        what = f"{about['batches']} batches with every pattern of missing inputs"
        return [f"- values differ from the run's by at most {about['difference']:.1g} on {what}"]
    excluded, split = about["int8"]["excluded"], about["int8"]["calibration_split"]
    layers = f"- {about['int8']['layers']} layers in 8 bits, in float32: {', '.join(excluded) or 'none'} (chosen on {split})"
    return [layers, f"- values differ from the run's by at most {about['difference']:.2g} on {split}; `shrink.json` has the scores"]


def score_lines(run: str | Path, names: Iterable[str]) -> list[str]:
    """The run's scores on test, if it has any."""
    path = Path(run).expanduser() / "results.json"
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))["test"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    shown = ", ".join(f"{name} {scores[name]:.4f}" for name in names if isinstance(scores.get(name), float))
    return [f"- scores on test: {shown}"] if shown else []
