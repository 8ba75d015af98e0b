"""Models of a run without its training: random weights, a tokenizer and tasks that have learnt from a few cells."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusion.data.kinds import ImageInput, Kind, TableInput, TextInput
from fusion.data.kinds.base import Checking
from fusion.data.processor import Processor
from fusion.encoders import Encoder, TableColumns, TimmImage, TransformersText
from fusion.heads import Concat
from fusion.model import FusionModel
from fusion.processing.images import ImageSpec
from fusion.rebuilding import class_of
from fusion.runs.bundle import FORMAT, write_bundle
from fusion.tasks import Classification, Task

BERT = {
    "model_type": "bert",
    "vocab_size": 120,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
WORDS = ["is", "there", "a", "red", "green", "blue", "circle", "square", "above", "below", "the", "what", "colour"]


def texts(seed: int, count: int) -> list[str]:
    """Distinct texts of different lengths."""
    rng = np.random.default_rng(seed)
    return [f"{' '.join(rng.choice(WORDS, rng.integers(1, 12)))} {i}" for i in range(count)]


def write_model(folder: Path, *, seed: int = 0, task: Task | None = None, table: bool = False) -> Path:
    """Writes a model's folder that reads image and text, and a table."""
    torch.manual_seed(seed)
    kinds: dict[str, Kind] = {"image": ImageInput(), "text": TextInput(max_length=16)}
    encoders: dict[str, Encoder] = {
        "image": TimmImage("test_vit", pretrained=False, image_size=32),
        "text": TransformersText(config=BERT),
    }
    kinds["image"].spec = ImageSpec((32, 32))  # type: ignore[attr-defined]
    kinds["text"].learn(texts(0, 50), encoders["text"])
    if table:
        kinds["facts"], encoders["facts"] = TableInput(["price", "brand"]), TableColumns(dim=16)
        rows = [(str(price), "ab"[price % 2]) for price in range(20)]
        kinds["facts"].check(rows, encoders["facts"], Checking(1.0, folder))
        kinds["facts"].learn(rows, encoders["facts"])
    task = task or learnt(Classification(), ("yes", "no", "red", "blue"))
    head_spec = {"class": "fusion.heads.Concat", "init": {"dim": 32}}
    model = FusionModel.build(encoders, partial(class_of(head_spec, Concat), **head_spec["init"]), task.out_dim)
    with torch.no_grad():  # so that answers differ between samples
        for parameter in model.head.parameters():
            parameter.mul_(3)
    about: dict[str, Any] = {
        "format": FORMAT,
        "encoders": {name: {"class": f"fusion.encoders.{type(one).__name__}", "init": one.spec()} for name, one in encoders.items()},
        "head": head_spec,
        "adapters": {},
        "processor": Processor(kinds, task).state(),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_bundle(folder, about, model.state_dict())
    return folder


def learnt(task: Task, cells: tuple[str, ...]) -> Task:
    task.learn({"train": list(cells)}, column="label", on_unseen="error")
    return task
