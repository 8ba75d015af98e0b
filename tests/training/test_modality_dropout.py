"""Training samples that lose a modality, never their last, and evaluated ones that lose none."""

import pytest
import torch

from fusion.encoders import Images, Texts
from fusion.errors import UserError
from fusion.training.modality_dropout import drop_modalities, retained_modalities


def test_each_modality_is_lost_as_often_as_asked_and_the_last_one_never():
    present = torch.ones(20_000, 3, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    kept = retained_modalities(present, torch.rand(present.shape, generator=generator), 0.5)
    assert kept.any(dim=1).all()
    # Of eight equally likely outcomes the one that loses all goes to one of the three.
    assert kept.float().mean(dim=0).tolist() == pytest.approx([0.5 + 0.125 / 3] * 3, abs=0.01)


def test_what_a_sample_lacks_is_not_kept_and_what_it_has_alone_is():
    images = Images(torch.zeros(4, 3, 2, 2), torch.tensor([True, False, True, False]))
    mask = torch.tensor([[True, False], [True, True], [False, False], [False, False]])
    for seed in range(20):
        torch.manual_seed(seed)
        kept = drop_modalities({"image": images, "text": Texts(torch.zeros(4, 2, dtype=torch.long), mask)}, 0.99)
        assert kept["image"].tolist()[1:] == [False, True, False]
        assert kept["text"].tolist()[1:] == [True, False, False]
        assert kept["image"][0] or kept["text"][0]


def test_training_samples_lose_modalities_and_evaluated_ones_do_not(parts, monkeypatch):
    from fusion.model import FusionModel

    seen = []
    forward = FusionModel.forward

    def watched(self, inputs, modality_mask=None):
        seen.append((self.training, modality_mask))
        return forward(self, inputs, modality_mask)

    monkeypatch.setattr(FusionModel, "forward", watched)
    model, data, trainer = parts("--model.modality_dropout=0.5", "--trainer.max_epochs=1")
    trainer.fit(model, datamodule=data)
    in_training = [kept for training, kept in seen if training]
    lost = sum(int((~k["image"]).sum()) for k in in_training) / sum(len(k["image"]) for k in in_training)
    assert 0.25 < lost < 0.5  # a third: half less those that would have lost both
    assert all(kept is None for training, kept in seen if not training)


def test_a_dropped_modality_is_a_missing_one(parts):
    model, data, _ = parts()
    model.build(data).eval()
    batch = next(iter(data.train_dataloader()))
    count = len(batch.target)
    nobody, all_of_them = torch.zeros(count, dtype=torch.bool), torch.ones(count, dtype=torch.bool)
    dropped = model.model(batch.inputs, {"image": nobody, "text": all_of_them}).output
    without = batch.inputs | {"image": batch.inputs["image"]._replace(present=nobody)}
    assert torch.allclose(dropped, model.model(without).output, atol=1e-6)


def test_a_probability_that_is_none_is_refused(parts):
    with pytest.raises(UserError, match="expected a probability"):
        parts("--model.modality_dropout=1.0")
