"""Units that contribute nothing, or always the same, are removed without any change of the output, from every family of encoders."""

import copy
from functools import partial

import pytest
import torch
from small_heads import COUNTS, DIMS, OUT, SMALL
from test_transformers_text import make
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from fusion.deploy.pruning.importance import cut
from fusion.deploy.pruning.refit import RIDGE, refit
from fusion.deploy.pruning.statistics import Moments, input_moments
from fusion.deploy.pruning.structured import called
from fusion.encoders import Images, Texts, TimmImage
from fusion.encoders.adapters import add_adapters
from fusion.errors import UserError
from fusion.features import Features
from fusion.heads import HEADS, Concat, CrossAttention, DualEncoder, available
from fusion.model import FusionModel, part_of
from fusion.pruning.blocks import each_by_itself, find_groups, groups_of
from fusion.pruning.groups import Consumer, Group, Producer
from fusion.pruning.widths import narrow

# By encoder, the kinds of units that can be removed from it.
TEXTS = {
    "bert": {"feed-forward units", "attention heads"},
    "roberta": {"feed-forward units", "attention heads"},
    "distilbert": {"feed-forward units"},
    "deberta-v2": {"feed-forward units"},
    "modernbert": set(),
}
IMAGES = {
    "test_vit": {"feed-forward units", "attention heads"},
    "test_convnext": {"feed-forward units"},
    "test_efficientnet": {"channels"},  # also with squeeze-and-excitation
    "mobilenetv3_small_050": {"channels"},
    "resnet10t": {"channels"},
    "test_efficientnet_gn": set(),
}
EVERY = [("test_vit", kind) for kind in TEXTS] + [(name, "bert") for name in IMAGES if name != "test_vit"]


def model_of(image="test_vit", text="bert", seed=0):
    torch.manual_seed(seed)
    encoders = {"image": TimmImage(image, pretrained=False, image_size=64), "text": make(text)}
    return FusionModel.build(encoders, CrossAttention, 3).eval()


def samples(model, count=4):
    rng = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, 3, 64, 64), generator=rng, dtype=torch.uint8)
    ids = torch.randint(4, model.encoders["text"].vocab_size, (count, 5), generator=rng)
    present = torch.ones(count, dtype=torch.bool)
    return {
        "image": Images(pixels, present, any_present=True, all_present=True),
        "text": Texts(ids, torch.ones_like(ids).bool(), full=True),
    }


@torch.no_grad()
def random_scales(model):
    """Gives normalisations, which begin as identities, and biases, which begin at zero, random values."""
    rng = torch.Generator().manual_seed(2)
    for p in model.parameters():
        if p.dim() == 1:
            p.add_(torch.randn(p.shape, generator=rng) * 0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=rng) * 0.1)


def halves(group):
    order = torch.randperm(group.units, generator=torch.Generator().manual_seed(group.units))
    some = max(1, group.units // 2)
    return order[:some].sort().values, order[some:].sort().values


@torch.no_grad()
def output(model, inputs):
    return model(inputs).output


def assert_close(a, b):
    assert (a - b).abs().max() <= 1e-6 * max(1.0, float(a.abs().max()))


@pytest.mark.parametrize(("image", "text"), EVERY)
@torch.no_grad()
def test_units_that_nothing_reads_are_removed_without_any_change(image, text):
    model = model_of(image, text)
    random_scales(model)
    inputs, groups = samples(model), find_groups(model)
    found = {part: {group.kind for name, group in groups.items() if part_of(name) == part} for part in ("image", "text")}
    assert found == {"image": IMAGES[image], "text": TEXTS[text]}
    for group in groups.values():
        for layer, _ in group.consumers:
            layer.weight[:, group.channels(halves(group)[1])] = 0
    before, count = output(model, inputs), sum(p.numel() for p in model.parameters())
    for group in groups.values():
        group.keep(halves(group)[0])
    assert_close(before, output(model, inputs))
    assert sum(p.numel() for p in model.parameters()) < 0.9 * count


@torch.no_grad()
def make_constant(group, channels):
    """Makes the outputs of these channels constant, at random values."""
    last = group.between[-1] if group.between else None
    value, copies = group.producers[0]
    if last is not None:
        last.weight[channels] = 0
        last.bias[channels] = torch.rand(len(channels))
    elif copies > 1:
        rows = channels + (copies - 1) * group.units * group.size
        value.weight[rows] = 0
        value.bias[rows] = torch.randn(len(channels))
    else:
        value.weight[channels] = 0
        value.bias[channels] = torch.randn(len(channels))


@pytest.mark.parametrize(("image", "text"), [("test_vit", "bert"), ("test_vit", "distilbert"), ("test_convnext", "bert")])
def test_units_that_are_constant_are_removed_and_their_means_folded_without_any_change(image, text):
    assert_folded(model_of(image, text))


@torch.no_grad()
def test_constant_channels_of_expanded_convolutions_are_folded_into_the_batch_normalisation_that_follows():
    model = model_of("mobilenetv2_050")
    assert all(layer.bias is None for group in find_groups(model).values() for layer, norm in group.consumers if norm is not None)
    assert_folded(model)


@torch.no_grad()
def assert_folded(model):
    random_scales(model)
    inputs, groups = samples(model), find_groups(model)
    for group in groups.values():
        make_constant(group, group.channels(halves(group)[1]))
    layers = [layer for group in groups.values() for layer, _ in group.consumers]
    moments = input_moments(model, layers, [inputs])
    before, plain = output(model, inputs), copy.deepcopy(model)
    for group in groups.values():
        kept, gone = halves(group)
        own = [moments.pop(0) for _ in group.consumers]
        assert own[0].covariance.diagonal()[group.channels(gone)].max() < 1e-6
        refit(group, kept, gone, own)
        group.keep(kept)
    assert (before - output(model, inputs)).abs().max() <= 1e-5 * max(1.0, float(before.abs().max()))
    for group in find_groups(plain).values():  # what the means are for
        group.keep(halves(group)[0])
    assert (before - output(plain, inputs)).abs().max() > 1e-2


@pytest.mark.parametrize("block", [BasicBlock(8, 8), Bottleneck(16, 4)])
@torch.no_grad()
def test_constant_channels_before_a_padded_convolution_are_folded_but_at_the_border(block):
    torch.manual_seed(0)
    block.eval()
    random_scales(block)
    _, group = next(groups_of(block))
    gone, kept = torch.tensor([0, 3]), torch.tensor([i for i in range(group.units) if i not in (0, 3)])
    make_constant(group, gone)
    x = torch.randn(2, block.conv1.in_channels, 9, 9)
    before = block(x)
    refit(group, kept, gone, input_moments(block, [block.conv2], [x]))
    group.keep(kept)
    difference = (before - block(x)).abs()
    assert difference[..., 1:-1, 1:-1].max() < 1e-5
    assert difference.max() > 1e-3


@torch.no_grad()
def test_squeeze_and_excitation_without_a_removed_channel_gates_the_others_as_with_its_mean():
    model = model_of("test_efficientnet")
    groups = {name: group for name, group in find_groups(model).items() if len(group.consumers) == 2}
    assert len(groups) == 2
    inputs = samples(model)
    for group in groups.values():
        gone = halves(group)[1]
        make_constant(group, gone)
        group.consumers[0].layer.weight[:, gone] = 0  # what remains is its part in the gates
    layers = [layer for group in groups.values() for layer, _ in group.consumers]
    moments = input_moments(model, layers, [inputs])
    before = output(model, inputs)
    for group in groups.values():
        kept, gone = halves(group)
        refit(group, kept, gone, [moments.pop(0) for _ in group.consumers])
        group.keep(kept)
    assert (before - output(model, inputs)).abs().max() <= 1e-5


def head_groups(head):
    return [group for module in head.modules() for _, group in groups_of(module)]


def small(name):
    torch.manual_seed(0)
    return HEADS[name](DIMS, OUT, **SMALL.get(name, {})).eval()


PRUNABLE = [name for name in available() if small(name).stage in ("tokens", "pooled") and head_groups(small(name))]


@pytest.mark.parametrize("name", PRUNABLE)
@torch.no_grad()
def test_units_that_nothing_reads_are_removed_from_every_head_that_has_some(name):
    head = small(name)
    features = {m: Features(torch.randn(4, COUNTS[m], D), torch.ones(4, COUNTS[m]).bool(), torch.randn(4, D)) for m, D in DIMS.items()}
    random_scales(head)
    for group in head_groups(head):
        for layer, _ in group.consumers:
            layer.weight[:, group.channels(halves(group)[1])] = 0
    before, count = head(features).output, sum(p.numel() for p in head.parameters())
    for group in head_groups(head):
        group.keep(halves(group)[0])
    assert_close(before, head(features).output)
    assert sum(p.numel() for p in head.parameters()) < count


def test_attention_heads_and_feed_forward_units_are_removed_from_the_heads_of_tokens():
    assert {"CrossAttention", "Bottleneck", "CoAttention", "JointTransformer", "Perceiver"} - set(PRUNABLE) <= {"JointTransformer"}


@torch.no_grad()
def test_a_unit_that_is_a_combination_of_others_is_removed_with_hardly_any_change():
    torch.manual_seed(0)
    pair = nn.Sequential(nn.Linear(3, 6), nn.Identity(), nn.Linear(6, 2))  # six units of three numbers
    _, group = next(groups_of(pair))
    x = torch.randn(200, 3)
    before = pair(x)
    moments = input_moments(pair, [pair[2]], [x])
    refit(group, torch.tensor([0, 2, 4]), torch.tensor([1, 3, 5]), moments)
    group.keep(torch.tensor([0, 2, 4]))
    error = (pair(x) - before).square().mean()
    assert error < 0.01 * before.var()


@torch.no_grad()
def test_refitting_is_the_ridge_regression_of_the_output_on_the_units_that_are_kept():
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    group = Group("feed-forward units", [Producer(nn.Linear(2, 5))], [Consumer(layer)])
    x = (torch.randn(300, 5) @ torch.randn(5, 5) + 1).double()
    kept, removed = torch.tensor([0, 2, 3]), torch.tensor([1, 4])
    own = Moments()
    own.add(x)
    weight, bias = layer.weight.double(), layer.bias.double()
    target = x[:, removed] @ weight[:, removed].T  # what is to be replaced
    centred = x[:, kept] - x[:, kept].mean(0)
    ridge = RIDGE * x.var(0, correction=0).mean() * len(x)
    slope = torch.linalg.solve(centred.T @ centred + ridge * torch.eye(3), centred.T @ (target - target.mean(0)))
    refit(group, kept, removed, [own])
    assert torch.allclose(layer.weight.double()[:, kept], weight[:, kept] + slope.T, atol=1e-4)
    assert torch.allclose(layer.bias.double(), bias + target.mean(0) - x[:, kept].mean(0) @ slope, atol=1e-4)


# Widths


@pytest.mark.parametrize("image", ["test_vit", "test_efficientnet", "resnet10t"])
def test_a_model_is_rebuilt_by_its_widths_and_its_weights_to_the_bit(image):
    model = model_of(image)
    widths = {}
    for name, group in find_groups(model).items():
        group.keep(halves(group)[0])
        widths[name] = group.units
    again = model_of(image, seed=1)
    narrow(again, widths)
    assert list(find_groups(again)) == list(find_groups(model)) == list(widths)
    again.load_state_dict(model.state_dict())
    inputs = samples(model)
    assert torch.equal(output(model, inputs), output(again, inputs))
    strides = [{name: value.stride() for name, value in one.state_dict().items()} for one in (model, again)]
    assert strides[0] == strides[1]


def test_a_narrowed_model_trains_every_weight_it_has():
    model = model_of("test_efficientnet")
    narrow(model, {name: max(1, group.units // 2) for name, group in find_groups(model).items()})
    model.train()
    model(samples(model)).output.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_finding_and_removing_units_draws_no_random_numbers():
    model = model_of("test_efficientnet")
    state = torch.get_rng_state()
    narrow(model, dict.fromkeys(find_groups(model), 1))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"text.body.encoder.layer.9.intermediate.dense": 2}, "no units 'text.body.encoder.layer.9.intermediate.dense'.*Did you mean"),
        ({"text.body.encoder.layer.0.intermediate.dense": 0}, "is 0; expected a number of feed-forward units from 1 to"),
        ({"text.body.encoder.layer.0.attention.self.value": 99}, "is 99; expected a number of attention heads from 1 to"),
        ({"text.body.encoder.layer.0.attention.self.value": 1.5}, "is 1.5; expected a number of attention heads"),
    ],
)
def test_widths_that_a_model_cannot_have_are_rejected(widths, message):
    with pytest.raises(UserError, match=message):
        narrow(model_of(), widths)


def test_encoders_with_adapters_are_left_as_they_are():
    model = model_of()
    add_adapters(model.encoders, {"text": {"target_modules": ["query", "value"]}})
    assert {part_of(name) for name in find_groups(model)} == {"image", "head"}


# Parts


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.GELU(), True),
        (nn.Dropout(0.5), True),
        (nn.Softmax(dim=-1), False),
        (nn.GLU(), False),
        (nn.LayerNorm(4), False),
        (nn.PReLU(), False),
    ],
)
def test_layers_that_mix_channels_or_have_weights_are_told_from_activations(layer, expected):
    assert each_by_itself(layer.train()) is expected
    assert layer.training


def test_a_sequence_with_a_norm_between_its_linear_layers_has_no_units_to_remove():
    assert list(groups_of(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)))) == []
    assert len(list(groups_of(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))))) == 2


def test_moments_are_those_of_all_positions():
    torch.manual_seed(0)
    tokens, maps = torch.randn(3, 5, 4), torch.randn(3, 4, 2, 2)
    for x, flat in ((tokens, tokens.reshape(-1, 4)), (maps, maps.permute(0, 2, 3, 1).reshape(-1, 4))):
        layer = nn.Conv2d(4, 1, 1) if x.dim() == 4 else nn.Linear(4, 1)
        (moments,) = input_moments(layer, [layer], [x[:1], x[1:]])
        assert torch.allclose(moments.mean, flat.double().mean(0))
        assert torch.allclose(moments.covariance, flat.double().T.cov(correction=0), atol=1e-6)


def test_units_that_take_no_part_in_predictions_are_left():
    head = partial(DualEncoder, matcher="CrossAttention", matcher_args=SMALL["CrossAttention"])
    model = FusionModel.build({"image": TimmImage("test_vit", pretrained=False, image_size=64), "text": make("bert")}, head, 8)
    groups = find_groups(model)
    layers = [consumer.layer for group in groups.values() for consumer in group.consumers]
    kept, moments = called(groups, input_moments(model, layers, [samples(model)]))
    assert {name for name in groups if name.startswith("head.matcher")} == groups.keys() - kept.keys() != set()
    assert all(one.count for one in moments)
    assert cut(kept, moments, 0.5, "variance")


def test_the_moments_are_those_in_evaluation_mode():
    model = FusionModel.build({"image": TimmImage("test_vit", pretrained=False, image_size=64), "text": make("bert")}, Concat, 3).train()
    layers = [consumer.layer for group in find_groups(model).values() for consumer in group.consumers]
    first, second = (input_moments(model, layers, [samples(model)]) for _ in range(2))
    assert all(torch.equal(a.mean, b.mean) for a, b in zip(first, second, strict=True))
