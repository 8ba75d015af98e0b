"""What is frozen doesn't move, thaws at its update, and then learns as if it never had been, on one rank, on two, and across a resume."""

import pytest
import torch
from lightning.pytorch import Callback
from slow_cases import slow_except
from tiny_world import ROUNDING, assert_same_end, furthest_weights

from fusion.errors import UserError


class Moves(Callback):
    """For each batch the parts that moved, and the parts in training mode."""

    def __init__(self):
        self.moved, self.training = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.before = {name: p.detach().clone() for name, p in module.model.named_parameters()}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        moved = {name for name, p in module.model.named_parameters() if not torch.equal(p, self.before[name])}
        self.moved.append({part(name) for name in moved})
        self.training.append({name for name, encoder in module.model.encoders.items() if encoder.training})


def part(name):
    return name.split(".")[1] if name.startswith("encoders") else "head"


EVERYTHING = {"image", "text", "head"}


def test_a_part_is_still_until_its_update_and_then_learns(parts):
    watch = Moves()
    model, data, trainer = parts('--model.freeze={"image": {"until_update": 3}}', "--trainer.max_steps=6", callbacks=[watch])
    trainer.fit(model, datamodule=data)
    assert watch.moved == [{"text", "head"}] * 3 + [EVERYTHING] * 3
    assert watch.training == [{"text"}] * 3 + [{"image", "text"}] * 3


def test_the_count_is_of_updates_not_of_batches(parts):
    watch = Moves()
    options = ["--trainer.max_steps=3", "--trainer.accumulate_grad_batches=2"]
    model, data, trainer = parts('--model.freeze={"image": {"until_update": 2}}', *options, callbacks=[watch])
    trainer.fit(model, datamodule=data)
    assert watch.moved == [set(), {"text", "head"}] * 2 + [set(), EVERYTHING]


def test_a_part_that_never_thaws_has_no_optimiser_state_and_no_graph(parts):
    model, data, trainer = parts('--model.freeze={"text": {}}', "--trainer.max_steps=2")
    trainer.fit(model, datamodule=data)
    text = set(model.model.encoders["text"].parameters())
    assert not text & {p for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert all(p.grad is None for p in text)
    batch = next(iter(data.train_dataloader()))
    assert not model.model.encoders["text"](batch.inputs["text"]).tokens.requires_grad


def test_a_pattern_holds_the_parameters_that_it_matches_and_no_others(parts):
    model, data, trainer = parts('--model.freeze={"text.*embeddings*": {}, "*norm*": {"until_update": 2}}', "--trainer.max_steps=2")
    model.build(data)
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    trainer.fit(model, datamodule=data)
    still = {name for name, p in model.model.named_parameters() if torch.equal(p, before[name])}
    assert still == {name for name in before if ("text" in name and "embeddings" in name) or "norm" in name}


def test_frozen_batch_normalisation_keeps_its_statistics(parts):
    resnet = ["--model.image.init_args.name=resnet10t", '--model.freeze={"image.*bn*": {}, "image.*conv1.*": {}}']
    model, data, trainer = parts(*resnet, "--trainer.max_steps=2")
    model.build(data)
    before = {name: b.clone() for name, b in model.model.encoders["image"].named_buffers() if "running" in name}
    trainer.fit(model, datamodule=data)
    after = dict(model.model.encoders["image"].named_buffers())
    held = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if ".bn1." in name} <= held
    assert held < set(before)  # those of the layers that still learn go on


def test_the_rest_learns_beside_a_frozen_part_as_it_would_without(parts):
    free, data, trainer = parts("--trainer.max_steps=1", "--model.optimizer.init_args.momentum=0")
    trainer.fit(free, datamodule=data)
    frozen, data, trainer = parts(
        "--trainer.max_steps=1", "--model.optimizer.init_args.momentum=0", '--model.freeze={"image": {"until_update": 1}}'
    )
    trainer.fit(frozen, datamodule=data)
    differ = {name for (name, a), b in zip(free.model.named_parameters(), frozen.model.parameters(), strict=True) if not torch.equal(a, b)}
    assert {part(name) for name in differ} == {"image"}


THAW = '--model.freeze={"image": {"until_update": 5}, "text.*embeddings*": {"until_update": 11}}'


@pytest.mark.parametrize("stop", slow_except([3, 5, 9], 3))
def test_a_resumed_run_thaws_when_the_whole_one_does(interrupted_and_whole, fit_here, stop):
    stopped, whole = interrupted_and_whole(stop, THAW)
    assert_same_end(fit_here("--resume", stopped.folder), whole)


@pytest.mark.slow
def test_two_ranks_thaw_together_and_stay_alike(tiny, fit_here, fit_on_two):
    recipe = tiny()
    one = fit_here("--recipe", recipe, THAW, runs="one")
    two, _ = fit_on_two(recipe, THAW, runs="two")
    assert furthest_weights(one, two) < ROUNDING


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ('{"imge": {}}', "unknown part 'imge'"),
        ('{"text.*lstm*": {}}', "no parameter matches"),
        ('{"image": {"until_update": 0}}', "at least 1"),
        ('{"image": {}, "text": {}, "head": {}}', "no trainable parameter is left"),
    ],
)
def test_a_freeze_that_means_nothing_is_refused(parts, freeze, message):
    def build():
        model, data, _ = parts(f"--model.freeze={freeze}")
        model.build(data)

    with pytest.raises(UserError, match=message):
        build()
