"""A pretrained pair in a run: its own processing of images by default, weights and tokenizer kept, loaded without its folder."""

import shutil
from functools import partial

import numpy as np
import pytest
import torch
from tiny_pairs import KINDS, save_pair
from tiny_world import SHORT, train

from fusion.data import FusionData
from fusion.encoders import PairImage, PairText
from fusion.heads import CrossAttention, DualEncoder, Gated
from fusion.predictor import Predictor
from fusion.tasks import Retrieval
from fusion.training import Engine


@pytest.fixture(params=KINDS)
def made(request, write_manifest, tmp_path):
    """(kind, folder, task, data) of the tiny world with a pair."""

    def make(head=partial(Gated, dim=8), change=lambda i, row: row, adapters=None, of_task=None, **options):  # noqa: B008
        folder = str(save_pair(request.param, tmp_path / "pair"))
        data = FusionData(str(write_manifest(change)), cache=str(tmp_path / "cache"), batch_size=16, num_workers=0, **options)
        engine = Engine(image=partial(PairImage, folder), text=partial(PairText, folder), task=of_task, head=head, adapters=adapters)
        return request.param, folder, engine, data

    return make


@pytest.mark.parametrize("head", [partial(Gated, dim=8), partial(CrossAttention, dim=16)], ids=["pooled", "tokens"])
def test_a_run_of_a_pair_is_loaded_without_its_folder(made, tmp_path, head):
    missing = lambda i, row: row | ({"text": ""} if i % 5 == 1 else {"image": ""} if i % 5 == 2 else {})  # noqa: E731
    _, folder, task, data = made(head, missing)
    trainer = train(task, data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    shutil.rmtree(folder)
    table = data.splits["test"].table
    loaded = Predictor.load(tmp_path / "run.ckpt", device="cpu")
    for inputs in ((table.inputs["image"], table.inputs["text"]), (table.inputs["image"], None), (None, table.inputs["text"])):
        if None in inputs:
            inputs = tuple(None if column is None else [cell or next(filter(None, column)) for cell in column] for column in inputs)
        expected = Predictor(task.model, task.processor).predict(*inputs)
        assert np.isfinite(expected.probabilities).all()
        assert np.array_equal(loaded.predict(*inputs).probabilities, expected.probabilities)
    image = loaded.model.encoders["image"]
    assert (image.temperature, image.logit_bias) == (task.model.encoders["image"].temperature, task.model.encoders["image"].logit_bias)


@pytest.mark.parametrize("resize", [None, "pad"])
def test_images_are_resized_as_the_pair_was_trained_unless_the_data_says_otherwise(made, resize):
    kind, _, task, data = made(resize=resize)
    task.build(data)
    spec = data.processor.inputs["image"].spec
    assert spec.resize == (resize or {"clip": "crop", "siglip": "squash"}[kind])
    assert (spec.size, spec.interpolation) == ((32, 32), "bicubic")


def test_the_recipe_trains_a_pair_from_a_folder(tmp_path, write_manifest, fit_here):
    folder = save_pair("siglip", tmp_path / "pair")
    names = [f"--model.{name}.name_or_path={folder}" for name in ("image", "text")]
    data = [f"--data.manifest={write_manifest()}", f"--data.cache={tmp_path / 'cache'}", "--data.num_workers=0"]
    run = fit_here("--recipe", "own", "--recipe", "encoders/clip", *names, *data, *SHORT, "--trainer.accelerator=cpu")
    shutil.rmtree(folder)
    loaded = Predictor.load(run.folder, checkpoint="last", device="cpu")
    assert loaded.processor.inputs["image"].spec.resize == "squash"
    assert loaded.predict(texts=["is there a red circle?"]).values.shape[0] == 1


def test_adapters_of_a_pair_freeze_its_projection_too(made):
    _, _, task, data = made(adapters={name: {"r": 2, "target_modules": ["q_proj"]} for name in ("image", "text")})
    train(task, data)
    for name in ("image", "text"):
        trained = [key for key, p in task.model.encoders[name].named_parameters() if p.requires_grad]
        assert trained
        assert all("lora_" in key for key in trained)


def test_retrieval_starts_from_the_pairs_own_similarities_and_trains_both_towers(made):
    distinct = lambda i, row: row | {"text": f"{row['text']} {row['label']} {i % 9} {i // 9}"}  # noqa: E731
    head = partial(DualEncoder, projection="none", temperature=0.05)
    _, folder, _, _ = made()
    width = PairText(folder).dim
    _, _, task, data = made(head, distinct, of_task=Retrieval(dim=width))
    model = task.build(data).eval()
    batch = data.splits["test"].samples.unaugmented()
    with torch.no_grad():
        inputs = batch[0].inputs | {}
        pooled = [torch.nn.functional.normalize(model.encoders[name](inputs[name]).unshared().pooled) for name in ("image", "text")]
        similarity = task.task.in_units(task.task.values(model(inputs).output).numpy())[0, 0]
    assert similarity == pytest.approx(float((pooled[0] * pooled[1]).sum()), abs=1e-5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(task, data)
    changed = {name.split(".")[1] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {"image", "text", "log_scale"} <= changed
