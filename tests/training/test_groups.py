"""Which parameters learn how fast, and which are left out of weight decay."""

from functools import partial

import pytest
import torch

from fusion.encoders import TimmImage, TransformersText
from fusion.errors import UserError
from fusion.heads import Bottleneck, Concat, Perceiver
from fusion.model import FusionModel
from fusion.training import Linear, Rate
from fusion.training.optim.groups import layer_factors, parameter_groups


def named_groups(model, **options):
    """By the name of each parameter of the model, the optimiser's group that it is in; what is in no group is left out."""
    optimizer = torch.optim.AdamW(parameter_groups(model.model, **options), lr=0.1, weight_decay=0.5)
    names = {p: name for name, p in model.model.named_parameters()}
    found = {names[p]: group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found)
    return found


# Weight decay.


@pytest.fixture
def built(parts):
    model, data, _ = parts()
    model.build(data)
    return model


def test_only_the_weights_of_linear_maps_and_convolutions_decay(built):
    decayed = {name for name, group in named_groups(built).items() if group["weight_decay"]}
    all_names = dict(built.model.named_parameters())
    assert all(name.endswith("weight") and all_names[name].dim() > 1 for name in decayed)
    rest = all_names.keys() - decayed
    assert {name for name, p in all_names.items() if p.dim() <= 1} < rest
    assert {name for name in rest if all_names[name].dim() > 1} == {
        "encoders.image.body.pos_embed",
        "encoders.image.body.cls_token",
        "encoders.text.body.embeddings.word_embeddings.weight",
        "encoders.text.body.embeddings.position_embeddings.weight",
        "encoders.text.body.embeddings.token_type_embeddings.weight",
    } & all_names.keys()
    assert "encoders.text.body.embeddings.word_embeddings.weight" in rest


@pytest.mark.parametrize(("head", "tables"), [(Perceiver, ["latents", "modality.a"]), (Bottleneck, ["bottlenecks", "class_tokens.a"])])
def test_latents_and_class_tokens_of_heads_do_not_decay(head, tables):
    class Holder(torch.nn.Module):
        pass

    model = Holder()
    model.head, model.encoders = head({"a": 8, "b": 8}, 3), torch.nn.ModuleDict()
    groups = parameter_groups(model)
    undecayed = {id(p) for group in groups if group.get("weight_decay") == 0.0 for p in group["params"]}
    for name in tables:
        assert id(model.head.get_parameter(name)) in undecayed, name
    assert id(model.head.classifier.weight) not in undecayed


def test_without_a_gradient_decay_shrinks_what_decays_and_leaves_the_rest(built):
    decayed = {name for name, group in named_groups(built).items() if group["weight_decay"]}
    optimizer = torch.optim.AdamW(parameter_groups(built.model), lr=0.1, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in built.model.named_parameters()}
    for p in built.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in built.model.named_parameters():
        assert torch.allclose(p, before[name] * (0.95 if name in decayed else 1.0)), name


def test_frozen_parameters_are_in_no_group(built):
    built.model.encoders["text"].freeze()
    assert {name for name in named_groups(built) if "encoders.text" in name} == set()


# Rates.


def test_a_part_learns_at_its_own_share_of_the_rate(parts):
    model, data, trainer = parts('--model.rates={"image": {"factor": 0.5}, "head": {"factor": 3.0}}', "--trainer.max_steps=1")
    trainer.fit(model, datamodule=data)
    names = {p: name for name, p in model.model.named_parameters()}
    peak = {names[p]: group["initial_lr"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
    for name, rate in peak.items():
        part = "head" if name.startswith("head") else name.split(".")[1]
        assert rate == pytest.approx({"image": 0.025, "text": 0.05, "head": 0.15}[part]), name


def test_a_frozen_rate_of_zero_moves_nothing_and_the_rest_learns(parts):
    model, data, trainer = parts('--model.rates={"text": {"factor": 0.0}}', "--trainer.max_steps=2")
    model.build(data)
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    trainer.fit(model, datamodule=data)
    moved = {name for name, p in model.model.named_parameters() if not torch.equal(p, before[name])}
    assert not any("encoders.text" in name for name in moved)
    assert any("encoders.image" in name for name in moved)


def test_a_parts_own_schedule_multiplies_the_runs(parts):
    image = '{"factor": 2.0, "schedule": {"class_path": "fusion.training.Linear", "init_args": {"warmup": 3}}}'
    model, data, trainer = parts(f'--model.rates={{"image": {image}}}', "--trainer.max_epochs=1")
    trainer.fit(model, datamodule=data)
    own = Linear(warmup=3)
    names = {p: name for name, p in model.model.named_parameters()}
    for group in trainer.optimizers[0].param_groups:
        of_image = names[group["params"][0]].startswith("encoders.image")
        factor = trainer.lr_scheduler_configs[0].scheduler.lr_lambdas[trainer.optimizers[0].param_groups.index(group)]
        for update in range(9):
            expected = model.schedule.factor(update, 8) * (own.factor(update, 8) if of_image else 1.0)
            assert factor(update) == pytest.approx(expected)
        assert group["initial_lr"] == pytest.approx(0.1 if of_image else 0.05)


BERT = {"model_type": "bert", "vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 8}


VIT = {"name": "test_vit", "pretrained": False, "image_size": 32}
RESNET = VIT | {"name": "resnet10t"}
LADDERS = {  # how many layers lie between a parameter's and the last
    "bert": {"embeddings.word_embeddings": 3, "encoder.layer.0.output.dense": 2, "encoder.layer.2.output.dense": 0},
    "vit": {"patch_embed.proj": 6, "blocks.0.norm1": 5, "blocks.5.norm1": 0, "norm": 0},
    "resnet": {"conv1.0": 4, "layer1.0.conv1": 3, "layer4.0.conv1": 0},
}


@pytest.mark.parametrize(
    ("encoder", "ladder"),
    [(partial(TransformersText, config=BERT), "bert"), (partial(TimmImage, **VIT), "vit"), (partial(TimmImage, **RESNET), "resnet")],
    ids=LADDERS,
)
def test_each_layer_learns_slower_than_the_one_after_it_by_the_decay(encoder, ladder):
    made = encoder()
    factors = layer_factors(made, 0.5)
    assert factors.keys() >= {name for name, _ in made.named_parameters()}
    for name, steps in LADDERS[ladder].items():
        assert factors[f"body.{name}.weight"] == 0.5**steps, name


def test_layer_decay_and_the_parts_factor_meet_in_the_groups():
    model = FusionModel.build({"text": TransformersText(config=BERT), "image": TimmImage(**VIT)}, partial(Concat, dim=8), 3)
    groups = parameter_groups(model, {"text": Rate(factor=0.1, layer_decay=0.5)})
    rate = {name: group["rate"] for group in groups for p in group["params"] for name, own in model.named_parameters() if own is p}
    assert rate["encoders.text.body.encoder.layer.2.output.dense.weight"] == pytest.approx(0.1)
    assert rate["encoders.text.body.encoder.layer.0.output.dense.weight"] == pytest.approx(0.025)
    assert rate["encoders.text.body.embeddings.word_embeddings.weight"] == pytest.approx(0.0125)
    assert rate["encoders.image.body.patch_embed.proj.weight"] == rate["head.classifier.weight"] == 1.0


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ('{"txt": {"factor": 0.1}}', "unknown part 'txt'"),
        ('{"text": {"factor": -1.0}}', "expected at least 0"),
        ('{"text": {"layer_decay": 0.0}}', "above 0 up to 1"),
        ('{"head": {"layer_decay": 0.5}}', "a head has no layers"),
    ],
)
def test_rates_that_mean_nothing_are_refused(parts, rates, message):
    with pytest.raises(UserError, match=message):
        parts(f"--model.rates={rates}")


def test_an_optimiser_of_another_library_takes_the_groups(parts):
    model, data, trainer = parts("--model.optimizer=timm.optim.Lion", "--model.optimizer.init_args.lr=0.001", "--trainer.max_epochs=3")
    trainer.fit(model, datamodule=data)
    assert type(trainer.optimizers[0]).__name__ == "Lion"
    assert {group["weight_decay"] for group in trainer.optimizers[0].param_groups} == {0.0}  # Lion's own default, and ours for vectors
    assert model.updates == 24
