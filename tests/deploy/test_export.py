"""Exports answer like the model, for every head, task, kind of input and family of encoders, whatever is missing; or they are refused."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_heads import SMALL
from test_timm_families import ONE_BLOCK, smallest
from test_transformers_text import EVERY, make

from fusion.deploy.exporting import TOLERANCE, largest_difference, write_graph
from fusion.deploy.graph import Graph, checked_batches
from fusion.encoders import Encoder, TableColumns, TimmImage
from fusion.errors import UserError
from fusion.heads import HEADS, Concat, CrossAttention, DualEncoder, FusionHead, JointTransformer, LevelWeighted, PerTask
from fusion.model import FusionModel
from fusion.packages.package import flat_arrays
from fusion.packages.runtimes import RUNTIMES, TorchRuntime
from fusion.processing.image import ImagePreprocessor
from fusion.processing.images import ImageSpec
from fusion.processing.preprocessor import Preprocessor
from fusion.processing.table import TablePreprocessor
from fusion.processing.text import TextPreprocessor
from fusion.processing.tokenizer import Tokenizer
from fusion.tasks import Classification, MultiLabel, MultiTask, Ordinal, Regression, Retrieval, SubTask, Task

WORDS = Tokenizer.train(["is there a red circle", "a blue square"], vocab_size=40, max_length=9)


def classes(names: tuple[str, ...] = ("a", "b", "c")) -> Task:
    return learnt(Classification(), names)


def learnt(task: Task, cells: tuple[str, ...]) -> Task:
    task.learn({"train": list(cells)}, column="label", on_unseen="error")
    return task


def table() -> tuple[Preprocessor, Encoder]:
    preprocessor = TablePreprocessor(
        ["price", "brand"], {"price": "number", "brand": "category"}, "standard", {"price": [1.0, 2.0]}, {"brand": ["x", "y"]}
    )
    return preprocessor, TableColumns(dim=8, heads=2, numbers=1, cardinalities=[3])


def images(name: str = "test_vit", size: int = 32, several: int = 1, **options: Any) -> tuple[Preprocessor, Encoder]:
    encoder = TimmImage(name, pretrained=False, image_size=size, **options)
    return ImagePreprocessor(ImageSpec(encoder.image_size, channels=encoder.readable_channels[0]), several), encoder


def texts(kind: str = "bert") -> tuple[Preprocessor, Encoder]:
    return TextPreprocessor(WORDS), make(kind)


def graph(head: Any, task: Task | None = None, **inputs: tuple[Preprocessor, Encoder]) -> Graph:
    torch.manual_seed(0)
    task = task or classes()
    inputs = inputs or {"image": images(), "text": texts()}
    model = FusionModel.build({name: encoder for name, (_, encoder) in inputs.items()}, head, task.out_dim)
    for parameter in model.head.parameters():  # gates that begin closed, or heads at 0, would hide a part of the graph
        if parameter.dim() and not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.1)
    return Graph(model, task, {name: preprocessor for name, (preprocessor, _) in inputs.items()})


def assert_exports(exported: Graph, to: Any, folder: Path) -> None:
    file = folder / RUNTIMES[to].file
    write_graph(exported, to, file)
    difference, batches = largest_difference(exported, RUNTIMES[to](file, exported.names, threads=1))
    assert difference <= TOLERANCE
    assert batches >= 2 ** len(exported.preprocessors)
    # What the comparison compares differs from sample to sample.
    with torch.inference_mode():
        values = exported(*map(torch.from_numpy, flat_arrays(next(checked_batches(exported.preprocessors))[1]).values()))
    assert len(values) < 2 or float(values.std(dim=0).max()) > 1e-4


def of(name: str) -> Any:
    return partial(HEADS[name], **SMALL.get(name, {}))


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("to", ["onnx", "torch"])
def test_every_head_is_exported(name: str, to: str, tmp_path: Path) -> None:
    assert_exports(graph(of(name)), to, tmp_path)


TASKS: dict[str, Any] = {
    "classes": classes,
    "labels": lambda: learnt(MultiLabel(), ("a;b", "b", "c")),
    "ordinal": lambda: learnt(Ordinal(), ("1", "2", "3", "4")),
    "numbers": lambda: learnt(Regression(), ("1", "2.5", "9")),
    "quantiles": lambda: learnt(Regression(loss="quantile"), ("1", "2.5", "9")),
    "gaussian": lambda: learnt(Regression(loss="gaussian"), ("1", "2.5", "9")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_exported(name: str, tmp_path: Path) -> None:
    assert_exports(graph(partial(Concat, dim=8), TASKS[name]()), "onnx", tmp_path)


@pytest.mark.slow
def test_the_embeddings_of_retrieval_are_exported(tmp_path: Path) -> None:
    task = Retrieval(dim=8)
    task.sides = ("image", "text")
    assert_exports(graph(DualEncoder, task), "onnx", tmp_path)


KINDS: dict[str, Any] = {
    "image, text and table": lambda: {"image": images(), "image_2": texts(), "facts": table()},
    "several images": lambda: {"photos": images(several=3), "text": texts()},
    "two texts": lambda: {"title": texts(), "body": texts()},
    "greyscale": lambda: {"image": images(options={"in_chans": 1}), "text": texts()},
    "table alone": lambda: {"facts": table(), "text": texts()},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_input_is_exported(name: str, tmp_path: Path) -> None:
    assert_exports(graph(partial(CrossAttention, dim=8, depth=1, num_heads=2, direction="both"), **KINDS[name]()), "onnx", tmp_path)


# What heads read of an encoder: pooled features of every family, embeddings and levels of some that compute them in other ways.
READINGS = [(kind, Concat) for kind in EVERY] + [(kind, LevelWeighted) for kind in ("bert", "t5", "gpt2")]
READINGS += [(kind, JointTransformer) for kind in ("bert", "deberta-v2", "modernbert")]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "head"), READINGS)
def test_every_family_of_text_encoders_is_exported(kind: str, head: type[FusionHead], tmp_path: Path) -> None:
    assert_exports(graph(of(head.__name__), image=images(), text=texts(kind)), "onnx", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["resnet", "efficientnet", "convnext", "vision_transformer", "swin_transformer", "eva", "mobilenetv3"])
def test_families_of_image_encoders_are_exported(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = TimmImage(smallest(family), pretrained=False, options={"depth": 1} if family in ONE_BLOCK else None)
    preprocessor = ImagePreprocessor(ImageSpec(encoder.image_size))
    assert_exports(graph(partial(Concat, dim=8), image=(preprocessor, encoder), text=texts()), "onnx", tmp_path)


@pytest.mark.slow
def test_a_compiled_package_differs_as_little(tmp_path: Path) -> None:
    assert_exports(graph(of("CrossAttention")), "aot", tmp_path)


def test_no_weight_of_a_program_is_looked_up_through_several_modules(tmp_path: Path) -> None:
    exported = graph(partial(Concat, dim=8))
    write_graph(exported, "torch", tmp_path / "model.pt2")
    runtime = TorchRuntime(tmp_path / "model.pt2", exported.names)
    paths = [node.target for node in runtime.model.graph.nodes if node.op == "get_attr"]
    assert len(paths) >= len(list(exported.parameters()))
    assert not any("." in path for path in paths)
    assert largest_difference(exported, runtime)[0] <= TOLERANCE


@pytest.mark.slow
def test_several_tasks_are_exported_side_by_side(tmp_path: Path) -> None:
    task = MultiTask([SubTask(Classification(), "mood"), SubTask(Regression(), "price")])
    task.learn({"train": task.joined({"mood": ["a", "b", "a"], "price": ["1", "2", "5"]}, {}, {})}, column="", on_unseen="error")
    heads = [{"head": "Concat", "out_dim": 2, "args": {"dim": 8}}, {"head": "Gated", "out_dim": 1, "args": {"dim": 8}}]
    assert_exports(graph(partial(PerTask, heads=heads), task), "onnx", tmp_path)


class Stubborn(Concat):
    """Its graph depends on the values of its input."""

    def fuse(self, features: Any) -> Any:
        fused = super().fuse(features)
        return fused * 2 if float(fused.sum()) > 0 else fused


def test_a_head_that_can_not_be_exported_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"the head Stubborn with these encoders \(image: TimmImage, text: TransformersText\) can't be exported"
    ):
        write_graph(graph(partial(Stubborn, dim=8)), "torch", tmp_path / "model.pt2")


def test_a_value_that_is_not_a_number_counts_as_a_difference() -> None:
    exported = graph(partial(Concat, dim=8))

    def wrong(arrays: dict[str, np.ndarray]) -> np.ndarray:
        values = exported(*map(torch.from_numpy, arrays.values())).detach().numpy()
        values[~arrays["image_present"]] = np.nan
        return values

    difference, _ = largest_difference(exported, wrong)
    assert not difference <= TOLERANCE


def test_the_batches_of_the_check_hold_every_pattern_of_missing_inputs() -> None:
    exported = graph(partial(Concat, dim=8), image=images(), text=texts(), facts=table())
    name, first = next(checked_batches(exported.preprocessors))
    assert name == "all patterns"
    patterns = {tuple(bool(first[one].present[i]) for one in first) for i in range(7)}
    assert len(patterns) == 7
    alone = [batch for _, batch in checked_batches(exported.preprocessors) if not batch["text"].present.any()]
    assert alone
