"""Adapters: what learns in an adapted encoder, and what its run predicts."""

import pytest
import torch

from fusion.errors import UserError
from fusion.predictor import Predictor

LORA = '--model.adapters={"text": {"r": 4, "target_modules": ["query", "value"]}}'
IMAGE_LORA = '--model.adapters={"image": {"r": 4, "target_modules": ["qkv"]}}'


@pytest.mark.parametrize(("lora", "adapted", "other"), [(LORA, "text", "image"), (IMAGE_LORA, "image", "text")])
def test_an_adapted_encoder_learns_by_its_small_matrices_alone(parts, lora, adapted, other):
    model, data, trainer = parts(lora, "--trainer.max_steps=3")
    model.build(data)
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    trainer.fit(model, datamodule=data)
    moved = {name for name, p in model.model.named_parameters() if not torch.equal(p, before[name])}
    in_adapted = {name for name in moved if name.startswith(f"encoders.{adapted}")}
    assert in_adapted
    assert all("lora_" in name for name in in_adapted)
    assert any(name.startswith(f"encoders.{other}") for name in moved)
    grouped = {p for group in trainer.optimizers[0].param_groups for p in group["params"]}
    own = {name for name in before if name.startswith(f"encoders.{adapted}")}
    in_groups = {name for name, p in model.model.named_parameters() if p in grouped}
    assert in_groups & own == {name for name in own if "lora_" in name}


def test_a_run_with_adapters_predicts_what_it_scored(tiny, fit_here, shapes_rows):
    run = fit_here("--recipe", tiny(), LORA, "--trainer.max_epochs=1")
    held = run.checkpoint("best")
    assert any("lora_A" in name for name in held["state_dict"])
    predictor = Predictor.load(run.folder)
    folder, rows = shapes_rows
    tested = [row for row in rows if row["split"] == "test"]
    predictions = predictor.predict([folder / row["image"] for row in tested], [row["text"] for row in tested])
    hits = sum(label == row["label"] for label, row in zip(predictions.labels, tested, strict=True)) / len(tested)
    assert hits == pytest.approx(run.results()["test"]["accuracy"], abs=1e-6)


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ('{"txt": {"r": 4}}', "unknown modality 'txt'"),
        ('{"text": {"peft_type": "LORRA"}}', "unknown peft_type 'LORRA'"),
        ('{"text": {"rank": 4}}', "rank"),
        ('{"text": {"r": 4, "target_modules": ["lstm"]}}', "lstm"),
        ('{"text": {"r": 0, "target_modules": ["query"]}}', "model.adapters.text: ValueError: `r` should be a positive integer"),
        ('{"text": {"r": 4, "target_modules": "(("}}', "model.adapters.text: error: missing \\)"),
        ('{"text": {"r": 4, "target_modules": ["query"], "lora_alpha": "x"}}', "model.adapters.text: TypeError"),
    ],
)
def test_adapters_that_can_not_be_are_refused(parts, adapters, message):
    model, data, _ = parts(f"--model.adapters={adapters}")
    with pytest.raises(UserError, match=message):
        model.build(data)
