"""Auxiliary losses of a head: added to the loss in training alone, as exact means under accumulation and ranks. And learned tokens."""

import pytest
import torch
from slow_cases import slow_except
from tiny_world import ROUNDING, furthest, furthest_weights
from torch.nn.functional import cross_entropy

import fusion
from fusion.heads import InteractionExperts

EXPERTS = ["--model.head=InteractionExperts", "--model.head.dim=8", "--model.head.weight=0.5"]
LEARNED = ["--model.head=CrossAttention", "--model.head.dim=8", "--model.head.missing=learned", "--model.modality_dropout=0.3"]


@pytest.mark.parametrize("balance", [[], ["--model.balance=UnimodalLosses"], ["--model.balance=GradientBlending"]], ids=" ".join)
def test_an_update_follows_the_gradient_of_the_loss_and_of_the_auxiliary_losses(parts, balance):
    plain = ["--model.optimizer.init_args.momentum=0", "--model.schedule=null", "--trainer.max_steps=1"]
    model, data, trainer = parts(*EXPERTS, *plain, *balance)
    model.build(data).train()
    batch = next(iter(data.train_dataloader()))
    output = model.model(batch.inputs)
    fused = cross_entropy(output.output, batch.target)
    alone = [cross_entropy(one, batch.target) for one in output.by_modality.values()]
    expected = {"": fused, "UnimodalLosses": fused + sum(alone), "GradientBlending": (fused + sum(alone)) / (1 + len(alone))}
    loss = expected[balance[0].rpartition("=")[2] if balance else ""]
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    head = {name: p for name, p in model.model.named_parameters() if name.startswith("head.")}
    both = torch.autograd.grad(loss + output.auxiliary.mean(), head.values(), retain_graph=True)
    auxiliary = dict(zip(head, torch.autograd.grad(output.auxiliary.mean(), head.values(), allow_unused=True), strict=True))
    trainer.fit(model, datamodule=data)
    for (name, p), gradient in zip(head.items(), both, strict=True):
        assert torch.allclose((before[name] - p.detach()) / 0.05, gradient, atol=2e-5), name
    reached = {name.split(".")[2] for name, gradient in auxiliary.items() if gradient is not None and gradient.abs().max() > 1e-4}
    assert reached == {"unique_image", "unique_text", "synergy", "redundancy"}


@pytest.mark.slow
def test_two_ranks_and_accumulated_batches_train_what_one_does(tiny, fit_here, fit_on_two):
    one = fit_here("--recipe", tiny(), *EXPERTS, runs="one")
    parts = fit_here("--recipe", tiny(), *EXPERTS, "--trainer.accumulate_grad_batches=4", runs="parts")
    two, _ = fit_on_two(tiny(), *EXPERTS, runs="two")
    for other in (parts, two):
        assert furthest(one.column("train/loss_step"), other.column("train/loss_step")) < ROUNDING
        assert furthest_weights(one, other) < ROUNDING
    without = fit_here("--recipe", tiny(), *EXPERTS, "--model.head.weight=0", runs="without")
    assert furthest_weights(one, without) > 100 * ROUNDING


@pytest.mark.parametrize("head", slow_except([EXPERTS, LEARNED], EXPERTS), ids=["experts", "learned tokens"])
def test_a_run_that_was_interrupted_goes_on_to_the_bit(tiny, assert_resumes_to_the_bit, head):
    assert_resumes_to_the_bit("--recipe", tiny(), *head)


def test_a_run_builds_its_experts_again_from_its_folder(tiny, fit_here):
    tokens = ["--model.head.expert=CrossAttention", '--model.head.expert_args={"depth": 1, "num_heads": 2}']
    run = fit_here("--recipe", tiny(), *EXPERTS, *tokens, "--trainer.max_epochs=1")
    head = fusion.load(str(run.folder)).model.head
    assert isinstance(head, InteractionExperts)
    assert head.stage == "tokens"
    assert {len(expert.layers) for expert in head.experts.values()} == {1}
