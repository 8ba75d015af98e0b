"""Runs of retrieval: the loss compares all samples of an update, whatever the devices and accumulated batches, and the run is used."""

import csv
import json
import weakref

import pytest
import torch
from lightning.pytorch import Callback
from slow_cases import slow_except
from test_precision import FP16
from tiny_world import ROUNDING, furthest, furthest_weights, rows_and_predictions

import fusion
from fusion.cli.evaluate import evaluate
from fusion.data.sampler import draw_seed
from fusion.data.samples import Samples
from fusion.errors import UserError
from fusion.losses import info_nce_loss
from fusion.session import fit
from fusion.training.callbacks.signals import SeedEachStep

PAIRS = ["--model.task=Retrieval", "--model.task.dim=16", "--model.head=DualEncoder", "--data.shuffle=samples"]
CHUNKS = [*PAIRS, "--trainer.accumulate_grad_batches=4"]
DROPOUT = ["--model.text.config.hidden_dropout_prob=0.3"]


@pytest.fixture
def pairs(tiny, write_manifest):
    """The recipe of the tiny world, with texts that are all different."""
    return lambda: tiny(manifest=write_manifest(lambda i, row: row | {"text": f"{row['text']} {row['label']} {i % 9} {i // 9}"}))


class Gradients(Callback):
    """Of the first update, before the optimiser's step."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if not hasattr(self, "found"):
            self.found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
            self.scale = 1.0


def first_gradients(parts, pairs, *options, seed=0):
    watch = Gradients()
    model, data, trainer = parts(*options, "--trainer.max_steps=1", callbacks=[SeedEachStep(seed), watch], manifest=manifest_of(pairs))
    before = {}

    class Before(Callback):
        def on_train_start(self, trainer, module):
            before.update({name: value.clone() for name, value in module.state_dict().items()})

    trainer.callbacks.insert(0, Before())
    trainer.fit(model, datamodule=data)
    return model, data, before, watch.found


def manifest_of(recipe):
    import yaml

    return yaml.safe_load(recipe().read_text())["data"]["manifest"]


@pytest.mark.parametrize("dropout", [[], DROPOUT], ids=["", "dropout"])
@pytest.mark.parametrize("precision", [[], FP16], ids=["fp32", "scaled"])
def test_accumulated_batches_have_the_gradient_of_the_whole_update(parts, pairs, dropout, precision):
    model, data, before, found = first_gradients(parts, pairs, *CHUNKS, *dropout, *precision)
    model.load_state_dict(before)
    model.zero_grad()
    model.train()
    loader = data.train_dataloader()
    batches = [batch for batch, _ in zip(loader, range(4), strict=False)]
    torch.manual_seed(draw_seed(0, 0, 0, 0))
    with torch.autocast("cpu", dtype=torch.float16, enabled=bool(precision)):
        output = torch.cat([model.model(batch.inputs).output for batch in batches])
        left, right = output.chunk(2, dim=1)
        info_nce_loss(left, right).mean().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert expected.keys() == found.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 1e-3
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) <= (1e-5 if not precision else 2e-3) * max(1.0, largest), name


def test_the_batches_of_an_update_are_not_held_at_once(parts, pairs, monkeypatch):
    held, most = set(), []

    def count(samples, draw, make=Samples.__getitems__):
        batch = make(samples, draw)
        number = len(most)
        held.add(number)
        weakref.finalize(batch.inputs["image"].pixels, held.discard, number)
        most.append(len(held))
        return batch

    monkeypatch.setattr(Samples, "__getitems__", count)
    eight = ["--trainer.accumulate_grad_batches=8", "--trainer.max_steps=2", "--trainer.limit_val_batches=0"]
    model, data, trainer = parts(*PAIRS, *eight, "--trainer.num_sanity_val_steps=0", manifest=manifest_of(pairs))
    trainer.fit(model, datamodule=data)
    assert model.updates == 2
    assert len(most) >= 2 * (8 + 7)  # all but the first are made twice
    assert max(most) <= 3  # the first of the update, the one that Lightning fetches in advance, and the one that is looked at


@pytest.mark.slow
def test_any_division_of_an_update_trains_the_same(pairs, fit_here, fit_on_two):
    recipe = pairs()
    whole = fit_here("--recipe", recipe, *PAIRS, runs="whole")
    assert whole.column("train/loss_epoch")[-1] < whole.column("train/loss_epoch")[0]
    divided = fit_here("--recipe", recipe, *CHUNKS, runs="divided")
    both, _ = fit_on_two(recipe, *PAIRS, "--trainer.accumulate_grad_batches=2", runs="both")
    for other in (divided, both):
        assert furthest_weights(whole, other) < ROUNDING
        assert furthest(whole.column("train/loss_epoch"), other.column("train/loss_epoch")) < 1e-4
        assert other.results()["test"] == pytest.approx(whole.results()["test"], abs=1e-4)


def test_the_gradient_over_two_ranks_is_that_of_one_process(pairs, fit_here, fit_on_two):
    # One step of plain descent at rate 1: weights differ as gradients do.
    one_step = ["--trainer.max_steps=1", "--model.optimizer.lr=1.0", "--model.optimizer.momentum=0", "--model.schedule=Constant"]
    recipe = pairs()
    whole = fit_here("--recipe", recipe, *PAIRS, *one_step, runs="whole")
    ranks, _ = fit_on_two(recipe, *PAIRS, *one_step, runs="ranks")
    assert furthest_weights(whole, ranks) < 1e-6


@pytest.mark.slow
def test_two_ranks_with_accumulation_and_dropout_resume_to_the_bit(pairs, fit_on_two):
    recipe, options = pairs(), [*PAIRS, *DROPOUT, "--trainer.accumulate_grad_batches=2", "--model.schedule=Constant"]
    whole, _ = fit_on_two(recipe, *options, runs="whole")
    half, _ = fit_on_two(recipe, *options, "--trainer.max_epochs=1", runs="half")
    resumed, _ = fit_on_two(half.folder, "--trainer.max_epochs=2", runs="half")
    assert furthest_weights(whole, resumed) == 0


@pytest.mark.parametrize("precision", slow_except([[], FP16], FP16), ids=["fp32", "fp16"])
def test_a_run_that_was_interrupted_ends_as_an_undisturbed_one(pairs, assert_resumes_to_the_bit, precision):
    assert_resumes_to_the_bit("--recipe", pairs(), *CHUNKS, *DROPOUT, *precision)


@pytest.mark.parametrize("options", [[], ["--model.task.loss=sigmoid", "--model.head.bias=-10", "--model.head.temperature=0.1"]])
def test_a_run_scores_and_predicts_as_its_model_does_elsewhere(pairs, fit_here, tmp_path, options):
    run = fit_here("--recipe", pairs(), *PAIRS, *options)
    scores = run.results()["test"]
    assert 0 <= scores["ceiling_chance"] <= scores["recall_10"] <= 1
    assert evaluate(["--run", str(run.folder)]) == 0
    evaluated = json.loads((run.folder / "evaluation-test.json").read_text())["all"]
    assert {name: evaluated[name] for name in scores if name in evaluated} == pytest.approx(
        {name: value for name, value in scores.items() if name in evaluated}, abs=1e-4
    )
    rows, found = rows_and_predictions(run, tmp_path / "manifest.csv")
    predictor = fusion.load(str(run.folder))
    answers = predictor.predict(images=[row["image"] for row in rows], texts=[row["text"] for row in rows]).answers
    assert [float(row["prediction"]) for row in found] == pytest.approx(answers, abs=1e-5)
    assert all(-1.001 <= answer <= 1.001 for answer in answers)


def test_a_pair_without_a_side_is_listed_and_the_label_column_is_not_needed(pairs, fit_here, tmp_path):
    recipe = pairs()
    with open(tmp_path / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rows[3]["text"] = ""
    with open(tmp_path / "manifest.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [name for name in rows[0] if name != "label"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    run = fit_here("--recipe", recipe, *PAIRS, "--trainer.max_epochs=1")
    with open(run.folder / "data_issues.csv", newline="") as file:
        assert [row["reason"] for row in csv.DictReader(file)] == ["no image or no text: both are needed for a pair"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.shuffle=images"], "data.shuffle is images, .* set --data.shuffle=samples"),
        (["--model.head=Concat"], "the head Concat fuses them: use --model.head=DualEncoder"),
        (["--model.head.temperature=1e-4"], r"temperature is 0.0001; expected at least 0.01"),
        (["--data.batch_size=64"], r"there are no 64 training pairs without a common item: at most \d+; set --data.batch_size="),
        (["--monitor=accuracy"], "Retrieval has no such score"),
        (["--model.balance=OGMGE"], "model.balance needs a prediction of each modality alone"),
        (["--model.mixing.mixup=0.2"], "the target of model.task=Retrieval can't be mixed"),
        (["--data.curriculum.by=loss", "--data.curriculum.first_pass=1"], "in Retrieval a sample has none by itself"),
    ],
)
def test_options_that_clash_with_it_are_rejected(pairs, options, message):
    with pytest.raises(UserError, match=message):
        fit(["--recipe", str(pairs()), *PAIRS, *options])
