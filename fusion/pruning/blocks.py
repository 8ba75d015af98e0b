"""Finds the groups of units that can be removed: in feed-forward maps, attention and residual blocks of convolutions."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from timm.layers import Attention as TimmAttention
from timm.models._efficientnet_blocks import EdgeResidual, InvertedResidual, SqueezeExcite
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusion.heads.attention import Attention
from fusion.model import FusionModel, plain_name
from fusion.pruning.groups import Consumer, Count, Group, Producer

# The two linear layers of a feed-forward map in modules of transformers and timm, with nothing but an activation and dropout between them.
PAIRS = (("fc1", "fc2"), ("lin1", "lin2"))


def find_groups(model: FusionModel) -> dict[str, Group]:
    """The groups of units that can be removed from a model, by the name of the layer that makes them, in the order of the modules; the same
    for a model from which units were removed. Encoders with adapters have none.
    """
    groups: dict[str, Group] = {}
    adapted = tuple(f"encoders.{name}." for name, encoder in model.encoders.items() if has_adapters(encoder))
    for path, module in model.named_modules():
        if f"{path}.".startswith(adapted):
            continue
        for layer, group in groups_of(module):
            groups[plain_name(f"{path}.{layer}")] = group
    return groups


def has_adapters(module: nn.Module) -> bool:
    return any(type(part).__module__.startswith("peft.") for part in module.modules())


def groups_of(module: nn.Module) -> Iterator[tuple[str, Group]]:
    """The groups of one block, each with the name of the layer within it that makes the units."""
    if isinstance(module, nn.Sequential):
        yield from sequential(module)
    elif type(module) is Attention:
        yield from own_attention(module)
    elif type(module) is TimmAttention:
        yield from timm_attention(module)
    elif type(module) in (InvertedResidual, EdgeResidual, BasicBlock, Bottleneck):
        yield from convolutions(module)
    else:
        yield from feed_forward(module)
        yield from bert_attention(module)


# Feed-forward maps


def feed_forward(module: nn.Module) -> Iterator[tuple[str, Group]]:
    """Those of BERT's family, in which two modules have one layer each, and of modules with both layers."""
    children = dict(module.named_children())
    for first, second in PAIRS:
        if {first, second} <= children.keys() and all(each_by_itself(m) for name, m in children.items() if name not in (first, second)):
            yield from linear_pair(first, children[first], children[second])
    inner, output = children.get("intermediate"), children.get("output")
    if type(inner).__name__.endswith("Intermediate") and type(output).__name__.endswith("Output") and inner is not None:
        inside = dict(inner.named_children())
        if all(each_by_itself(m) for name, m in inside.items() if name != "dense"):
            yield from linear_pair("intermediate.dense", inside.get("dense"), getattr(output, "dense", None))


def sequential(module: nn.Sequential) -> Iterator[tuple[str, Group]]:
    """Pairs of linear layers with only activations and dropout between them."""
    first: tuple[str, nn.Module] | None = None
    for name, layer in module.named_children():
        if type(layer) is nn.Linear:
            if first is not None:
                yield from linear_pair(first[0], first[1], layer)
            first = name, layer
        elif not each_by_itself(layer):
            first = None


def linear_pair(name: str, first: Any, second: Any) -> Iterator[tuple[str, Group]]:
    if type(first) is nn.Linear and type(second) is nn.Linear and second.in_features == first.out_features and second.bias is not None:
        yield name, Group("feed-forward units", [Producer(first)], [Consumer(second)])


def each_by_itself(module: nn.Module) -> bool:
    """Whether a module maps each channel regardless of the others, as activations and dropout do, but not softmax, gates or norms."""
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        return False
    x = torch.linspace(-3, 3, 24).view(2, 3, 4)
    training = module.training
    module.eval()
    try:
        whole, half = module(x.clone()), module(x[..., :2].clone())
        return whole.shape == x.shape and torch.equal(whole[..., :2], half)
    except Exception:  # of any type, from within a module that takes no tensor
        return False
    finally:
        module.train(training)


# Attention


def own_attention(module: Attention) -> Iterator[tuple[str, Group]]:
    producers = [Producer(module.value), Producer(module.query), Producer(module.key)]
    size = module.query.out_features // module.num_heads
    yield "value", Group("attention heads", producers, [Consumer(module.out)], size=size, counts=[Count(module, "num_heads")])


def timm_attention(module: Any) -> Iterator[tuple[str, Group]]:
    if type(module.norm) is nn.Identity and module.proj.bias is not None:
        gate = [] if module.gate is None else [Producer(module.gate)]
        counts = [Count(module, "num_heads"), Count(module, "attn_dim", module.head_dim)]
        yield (
            "qkv",
            Group("attention heads", [Producer(module.qkv, 3), *gate], [Consumer(module.proj)], size=module.head_dim, counts=counts),
        )


def bert_attention(module: nn.Module) -> Iterator[tuple[str, Group]]:
    """Of BERT's family: a module `self` of queries, keys and values, and a module `output` with a linear layer."""
    attention, output = getattr(module, "self", None), getattr(getattr(module, "output", None), "dense", None)
    names = ("query", "key", "value")
    if not isinstance(attention, nn.Module) or not all(type(getattr(attention, name, None)) is nn.Linear for name in names):
        return
    query, key, value = (getattr(attention, name) for name in names)
    size = getattr(attention, "attention_head_size", 0)
    others = [m for name, m in attention.named_children() if name not in names]
    if type(output) is not nn.Linear or output.bias is None or output.in_features != value.out_features or not size:
        return
    if query.out_features != value.out_features or query.out_features % size or not all(map(each_by_itself, others)):
        return
    counts = [Count(attention, "num_attention_heads"), Count(attention, "all_head_size", size)]
    group = Group("attention heads", [Producer(value), Producer(query), Producer(key)], [Consumer(output)], size=size, counts=counts)
    if heads_are_independent(attention, group):
        yield "self.value", group


def heads_are_independent(attention: nn.Module, group: Group) -> bool:
    """Whether removing a head leaves the outputs of the others as they are: found by trying, since models of other names share the layers'
    names."""
    if group.units < 2:
        return True  # there is nothing to remove, but its name must be known
    kept = torch.arange(1, group.units)
    with torch.no_grad():
        try:
            whole = deepcopy(attention).eval()
            less = deepcopy(whole)
            weight = group.producers[0].layer.weight
            x = torch.linspace(-1, 1, 3 * weight.shape[1]).to(weight).view(1, 3, -1)
            of_copy(less, group).keep(kept)
            expected, found = whole(x)[0], less(x)[0]
            return torch.allclose(expected[..., group.channels(kept)], found, rtol=1e-3, atol=1e-4)
        except Exception:  # of any type, from within the model's own code
            return False


def of_copy(attention: nn.Module, like: Group) -> Group:
    """The group of a copy of an attention module, without its output layer."""
    copies = [Producer(getattr(attention, name)) for name in ("value", "query", "key")]
    counts = [Count(attention, attribute, multiple) for _, attribute, multiple in like.counts]
    return Group(like.kind, copies, [], size=like.size, counts=counts)


# Residual blocks of convolutions


def convolutions(block: Any) -> Iterator[tuple[str, Group]]:
    """The channels within a block: the expanded ones of MobileNet's and EfficientNet's blocks, those between a ResNet's convolutions."""
    if type(block) is InvertedResidual:
        chains = [("conv_pw", ["bn1", "conv_dw", "bn2"], "conv_pwl", "bn3")]
    elif type(block) is EdgeResidual:
        chains = [("conv_exp", ["bn1"], "conv_pwl", "bn2")]
    elif type(block) is BasicBlock:
        chains = [("conv1", ["bn1"], "conv2", "bn2")]
    else:
        chains = [("conv1", ["bn1"], "conv2", "bn2"), ("conv2", ["bn2"], "conv3", "bn3")]
    for first, between, last, norm in chains:
        layers = [getattr(block, name) for name in between]
        unchanged = [getattr(block, name, None) for name in ("aa", "drop_block", "conv_s2d")]
        channels = [*layers, *(getattr(block, name, None) for name in ("act1", "act2"))]
        if not is_dense(getattr(block, first)) or not is_dense(getattr(block, last)) or not all(map(is_identity, unchanged)):
            continue
        if not all(map(keeps_channels_apart, channels)) or not can_shift(getattr(block, last), getattr(block, norm)):
            continue
        squeeze: Any = getattr(block, "se", None) if first in ("conv_pw", "conv_exp") else None
        if not is_identity(squeeze) and type(squeeze) is not SqueezeExcite:
            continue
        more = [] if is_identity(squeeze) else [squeeze]
        yield (
            first,
            Group(
                "channels",
                [Producer(getattr(block, first)), *(Producer(one.conv_expand) for one in more)],
                [Consumer(getattr(block, last), getattr(block, norm)), *(Consumer(one.conv_reduce) for one in more)],
                between=layers,
            ),
        )


def is_dense(layer: Any) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == 1


def is_identity(layer: Any) -> bool:
    return layer is None or type(layer) is nn.Identity


def keeps_channels_apart(layer: Any) -> bool:
    """Whether a layer is batch normalisation, with an activation or without, a depthwise convolution, or an activation."""
    if isinstance(layer, _BatchNorm):
        parts = [m for m in layer.children() if not each_by_itself(m)]
        return layer.running_mean is not None and not parts
    if isinstance(layer, nn.Conv2d):
        return layer.groups == layer.in_channels == layer.out_channels
    return layer is None or each_by_itself(layer)


def can_shift(layer: Any, norm: Any) -> bool:
    """Whether a constant can be added to a layer's outputs: by its bias, or by the mean of a batch normalisation."""
    return layer.bias is not None or (isinstance(norm, _BatchNorm) and norm.running_mean is not None)
