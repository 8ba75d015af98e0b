"""Heads made by any function: trained, saved, loaded again, balanced."""

from functools import partial

import numpy as np
import pytest
import torch
from tiny_world import BERT, train

from fusion.data import FusionData
from fusion.encoders import TimmImage, TransformersText
from fusion.errors import UserError
from fusion.heads import Gated, JointTransformer, LevelWeighted, LogitMean
from fusion.heads.cross_attention import CrossAttention
from fusion.predictor import Predictor
from fusion.training import Engine
from fusion.training.balance import OGMGE

FUNCTIONS = {
    "pooled": lambda dims, out: Gated(dims, out, dim=8),
    "tokens": lambda dims, out: CrossAttention(dims, out, dim=8, num_heads=2, depth=1),
    "levels": lambda dims, out: LevelWeighted(dims, out, dim=8, depths=2),
    "embeddings": lambda dims, out: JointTransformer(dims, out, dim=8, num_heads=2, depth=1),
}


@pytest.fixture
def made(write_manifest, tmp_path):
    """(task, data) of the tiny world with this head."""

    def make(head, **options):
        torch.manual_seed(0)
        data = FusionData(str(write_manifest()), cache=str(tmp_path / "cache"), batch_size=16, num_workers=0)
        image = partial(TimmImage, "test_vit", pretrained=False, image_size=32)
        return Engine(image=image, text=partial(TransformersText, config=BERT), head=head, **options), data

    return make


@pytest.mark.parametrize("stage", FUNCTIONS)
def test_a_run_whose_head_a_function_made_is_saved_and_predicts_as_it_was_trained(made, tmp_path, stage):
    task, data = made(FUNCTIONS[stage])
    trainer = train(task, data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert task.model.head.stage == stage
    table = data.splits["test"].table
    found = Predictor.load(tmp_path / "run.ckpt", device="cpu").predict(table.inputs["image"], table.inputs["text"])
    expected = Predictor(task.model, task.processor).predict(table.inputs["image"], table.inputs["text"])
    assert np.array_equal(found.probabilities, expected.probabilities)


def test_a_head_that_can_not_be_saved_is_rejected_before_training(made):
    def changed(dims, out):
        head = Gated(dims, out, dim=8)
        head.classifier = torch.nn.Linear(8, out, bias=False)
        return head

    task, data = made(changed)
    with pytest.raises(UserError, match="the head can't be saved"):
        task.build(data)


@pytest.mark.parametrize(
    "head",
    [
        partial(Gated, dim=8),
        lambda dims, out: LogitMean(dims, out, dim=8),
        lambda dims, out: Gated(dims, out, dim=8, unimodal=True),
        lambda dims, out, unimodal=False: Gated(dims, out, dim=8, unimodal=unimodal),
    ],
    ids=["class", "late", "function that passes it", "function that takes it"],
)
def test_balance_trains_any_head_that_can_predict_from_each_modality_alone(made, head):
    task, data = made(head, balance=OGMGE())
    train(task, data)
    assert task.updates == 2


def test_balance_rejects_a_function_whose_head_does_not_predict_from_each_modality_alone(made):
    task, data = made(FUNCTIONS["pooled"], balance=OGMGE())
    with pytest.raises(UserError, match=r"model\.balance needs a prediction of each modality alone.*pass unimodal=True"):
        task.build(data)
