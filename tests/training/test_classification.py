"""The task: its parts, its loss, its scores."""

from collections import Counter

import pytest
import torch
from torch import nn

from fusion.data.samples import Batch
from fusion.errors import UserError
from fusion.heads import Unimodal, available


def first_batch(data):
    return next(iter(data.train_dataloader()))


def test_samples_that_lack_a_modality_train_with_a_finite_loss(parts, write_manifest):
    def thin_out(i, row):
        return row | ({"image": ""} if i % 5 == 0 else {"text": ""} if i % 7 == 0 else {})

    seen = []
    model, data, trainer = parts("--trainer.max_epochs=1", manifest=write_manifest(thin_out))
    step = model.training_step

    def watched(batch, batch_idx):
        loss = step(batch, batch_idx)
        seen.append((float(loss.detach()), int((~batch.inputs["image"].present).sum()), int((~batch.inputs["text"].mask.any(1)).sum())))
        return loss

    model.training_step = watched
    trainer.fit(model, datamodule=data)
    losses, without_image, without_text = zip(*seen, strict=True)
    assert sum(without_image) > 10
    assert sum(without_text) > 5
    assert torch.isfinite(torch.tensor(losses)).all()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert float(trainer.callback_metrics["val/loss"]) < float("inf")


@pytest.mark.parametrize(("modality", "other"), [("text", "image"), ("image", "text")])
def test_one_modality_alone_uses_the_unimodal_head_and_one_encoder(parts, modality, other):
    model, data, trainer = parts(f'--model.modalities=["{modality}"]', "--trainer.max_steps=2")
    trainer.fit(model, datamodule=data)
    assert isinstance(model.model.head, Unimodal)
    assert list(model.model.encoders) == [modality]
    assert list(first_batch(data).inputs) == [modality]
    assert not any(f".{other}." in name for name, _ in model.named_parameters())
    assert model.updates == 2


@pytest.mark.parametrize(
    ("value", "message"),
    [('["image","txt"]', "unknown modality 'txt'"), ('["text","text"]', "each once"), ("[]", "each once")],
)
def test_modalities_that_make_no_sense_are_refused(parts, value, message):
    with pytest.raises(UserError, match=message):
        parts(f"--model.modalities={value}")


def test_a_modality_without_an_encoder_is_refused_by_name(parts):
    with pytest.raises(UserError, match=r"model\.image names no encoder"):
        parts("--model.image=null")


def test_balanced_class_weights_are_the_inverse_frequencies_in_train(parts):
    model, data, _ = parts("--model.task.class_weights=balanced")
    model.build(data)
    labels = [str(label) for label in data.splits["train"].table.labels]
    counts, classes = Counter(labels), data.processor.task.names
    expected = [len(labels) / (len(classes) * counts[name]) for name in classes]
    assert len(set(counts.values())) > 1
    assert model.task.class_weight.tolist() == pytest.approx(expected, rel=1e-6)
    # The mean weight of a training sample is one: the loss keeps its scale.
    assert sum(expected[classes.index(label)] for label in labels) / len(labels) == pytest.approx(1)


def test_class_weights_and_smoothing_reach_the_loss(parts):
    model, data, _ = parts("--model.task.class_weights=balanced", "--model.task.label_smoothing=0.2")
    model.build(data)
    logits = torch.randn(5, len(data.processor.task.names), dtype=torch.float64)
    target = torch.tensor([0, 1, 0, 2, 1])
    weight, log_p, n = model.task.class_weight.double(), logits.log_softmax(1), logits.shape[1]
    # (1 - s) of the target's own term, s spread evenly; both weighted by class and divided by the weights of the targets.
    own = -(weight[target] * log_p[torch.arange(5), target]).sum()
    spread = -(weight * log_p).sum() / n
    expected = (0.8 * own + 0.2 * spread) / weight[target].sum()
    model.task.class_weight = weight
    assert model.loss(logits, target) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("head", available())
def test_every_trainable_parameter_gets_a_gradient_from_one_batch(parts, head):
    model, data, _ = parts(f"--model.head={head}")
    model.build(data)
    model.train()
    with torch.no_grad():
        for gate in (p for name, p in model.named_parameters() if "gate_" in name):
            gate.fill_(0.5)  # shut at the start by design: then nothing behind them has a gradient
    batch = first_batch(data)
    model.loss(model(batch.inputs), batch.target).backward()
    lacking = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not lacking
    # Attention doesn't change when all scores of a query shift alike: a key's bias has no effect, and rounding noise for a gradient.
    still = [name for name, p in model.named_parameters() if p.requires_grad and float(p.grad.abs().max()) == 0]
    assert not [name for name in still if "position_embeddings" not in name and "key.bias" not in name]


def test_placeholders_and_unseen_labels_are_scored_as_they_should(parts):
    model, data, _ = parts()
    model.build(data)
    classes = len(data.processor.task.names)
    chosen = torch.tensor([0, 1, 2, 0])
    model.forward = lambda inputs: nn.functional.one_hot(chosen, classes).float() * 9  # predicts 0, 1, 2, 0
    model.score("test", Batch({}, torch.tensor([0, 1, 0, 1]), torch.tensor([4, 5, 6, -1])))
    # Two of three counted samples are hit; the placeholder, a miss, is left out.
    assert float(model.metrics["test"].compute()["accuracy"]) == pytest.approx(2 / 3)
    model.score("test", Batch({}, torch.tensor([0, 1, 0, 1]), torch.tensor([-1, -1, -1, -1])))
    assert float(model.metrics["test"].compute()["accuracy"]) == pytest.approx(2 / 3)


def test_training_without_an_end_is_refused(parts):
    model, data, trainer = parts("--trainer.max_epochs=-1")
    with pytest.raises(UserError, match="the schedule needs an end"):
        trainer.fit(model, datamodule=data)
