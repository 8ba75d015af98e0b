"""The heads as one would write them first: the plainest PyTorch of the same formulas, from a head's own weights.

What `fusion benchmark heads` measures the heads against, and one more check that they compute what they say. Masks are honoured by
multiplying and by filling scores, as is usual: finite values under a False mask are left out, NaN there would come through, and a sample
that lacks a modality is not provided for.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, normalize

from fusion.features import Features
from fusion.heads.joint_transformer import sinusoid

Given = dict[str, Features]


def mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def softmax(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)


def attention(layer: Any, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
    def split(y: Tensor) -> Tensor:
        return y.view(*y.shape[:2], layer.num_heads, -1).transpose(1, 2)

    query, key, value = split(layer.query(x)), split(layer.key(context)), split(layer.value(context))
    weights = softmax(query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5, mask[:, None, None])
    return layer.out((weights @ value).transpose(1, 2).reshape(x.shape))


def self_layer(layer: Any, x: Tensor, mask: Tensor) -> Tensor:
    normed = layer.norm_attention(x)
    x = x + attention(layer.attention, normed, normed, mask)
    return x + layer.feed_forward(layer.norm_feed_forward(x))


def cross_layer(layer: Any, x: Tensor, mask: Tensor, context: Tensor, context_mask: Tensor) -> Tensor:
    if layer.self_attention is not None:
        normed = layer.norm_self(x)
        x = x + attention(layer.self_attention, normed, normed, mask)
    read = attention(layer.cross_attention, layer.norm_query(x), layer.norm_context(context), context_mask)
    x = x + (read if layer.gate_attention is None else layer.gate_attention.tanh() * read)
    passed = layer.feed_forward(layer.norm_feed_forward(x))
    return x + (passed if layer.gate_feed_forward is None else layer.gate_feed_forward.tanh() * passed)


def joint_transformer(head: Any, given: Given) -> Tensor:
    size = len(next(iter(given.values())).mask)
    tokens, masks = [head.class_token.expand(size, 1, -1)], [torch.ones(size, 1, dtype=torch.bool, device=head.class_token.device)]
    for name, f in given.items():
        t = head.project[name](f.tokens) + head.modality[name]
        tokens.append(t + sinusoid(t))
        masks.append(f.mask)
    x, mask = torch.cat(tokens, dim=1), torch.cat(masks, dim=1)
    for layer in head.layers:
        x = self_layer(layer, x, mask)
    return head.classifier(head.norm(x)[:, 0])


def concat(head: Any, given: Given) -> Tensor:
    return head.classifier(head.mix(torch.cat([head.norm[name](f.pooled) for name, f in given.items()], dim=-1)))


def residual_mlp(head: Any, given: Given) -> Tensor:
    x = head.project(torch.cat([head.norm[name](f.pooled) for name, f in given.items()], dim=-1))
    for block in head.blocks:
        x = x + block(x)
    return head.classifier(head.norm_joint(x))


def gated(head: Any, given: Given) -> Tensor:
    joint = torch.cat([f.pooled for f in given.values()], dim=-1)
    z = torch.stack([head.gate[name](joint) for name in given]).softmax(dim=0)
    h = torch.stack([head.candidate[name](f.pooled).tanh() for name, f in given.items()])
    return head.classifier((z * h).sum(dim=0))


def film(head: Any, given: Given) -> Tensor:
    c = head.norm_condition(given[head.condition].pooled)
    x = head.project(head.norm_stream(given[head.stream].pooled))
    for first, second, modulate in zip(head.first, head.second, head.modulate, strict=True):
        gamma, beta = modulate(c).chunk(2, dim=-1)
        h = torch.relu(first(x))
        y = second(h)
        x = h + torch.relu((gamma + 1) * layer_norm(y, y.shape[-1:]) + beta)
    return head.classifier(x)


def tensor_fusion(head: Any, given: Given) -> Tensor:
    joint = torch.ones(len(next(iter(given.values())).mask), 1, device=head.classifier.weight.device)
    for name, f in given.items():
        h = head.embed[name](f.pooled)
        h = torch.cat([h, torch.ones(len(h), 1, device=h.device)], dim=-1)
        joint = torch.bmm(joint[:, :, None], h[:, None]).flatten(1)
    return head.classifier(head.mix(joint))


def low_rank_tensor(head: Any, given: Given) -> Tensor:
    product: Any = 1
    for name, f in given.items():
        x = head.norm[name](f.pooled)
        x = torch.cat([x, torch.ones(len(x), 1, device=x.device)], dim=-1)
        factor = torch.cat([head.factor[name].weight, head.factor[name].bias[:, None]], dim=1).view(head.rank, -1, x.shape[1])
        product = product * torch.matmul(x, factor.transpose(1, 2))  # (rank, B, dim)
    return head.classifier(product.sum(dim=0))


def factorized_bilinear(head: Any, given: Given) -> Tensor:
    one, other = (head.factor[name](head.norm[name](f.pooled)) for name, f in given.items())
    z = (one * other).view(len(one), -1, head.rank).sum(dim=-1)
    return head.classifier(normalize(z.sign() * z.abs().sqrt(), dim=-1))


def mutan(head: Any, given: Given) -> Tensor:
    (a, one), (b, other) = ((name, head.embed[name](f.pooled)) for name, f in given.items())
    z: Any = 0
    for m, n, c, d in zip(*(x.chunk(head.rank) for key in (a, b) for x in (head.factor[key].weight, head.factor[key].bias)), strict=True):
        z = z + (one @ m.T + n) * (other @ c.T + d)
    return head.classifier(z)


def embrace(head: Any, given: Given) -> Tensor:
    docked = torch.stack([head.dock[name](f.pooled) for name, f in given.items()], dim=1)
    if head.training:
        drawn = torch.multinomial(head.probabilities.expand(len(docked), -1), docked.shape[-1], replacement=True)
        chosen = nn.functional.one_hot(drawn, len(given)).transpose(1, 2)
        return head.classifier(head.mix((docked * chosen).sum(dim=1)))
    return head.classifier(head.mix((docked * head.probabilities[:, None]).sum(dim=1)))


def level_weighted(head: Any, given: dict[str, list[Features]]) -> Tensor:
    h = {
        name: torch.stack([project(f.pooled) for project, f in zip(head.project[name], found, strict=True)], dim=1)
        for name, found in given.items()
    }
    joint = torch.cat([x.flatten(1) for x in h.values()], dim=-1)
    mixed = [(head.weigh[name](joint).softmax(dim=-1)[..., None] * x).sum(dim=1) for name, x in h.items()]
    return head.classifier(head.mix(torch.cat(mixed, dim=-1)))


def squeeze_excite(head: Any, given: Given) -> Tensor:
    x = {name: head.norm[name](f.tokens) for name, f in given.items()}
    z = head.squeeze(torch.cat([mean(x[name], f.mask) for name, f in given.items()], dim=-1))
    pooled = []
    for name, f in given.items():
        y = x[name] * 2 * head.excite[name](z).sigmoid()[:, None]
        if name in head.places:
            place = head.places[name]
            scores = place.score((place.token(y) + place.summary(z)[:, None]).tanh()).squeeze(-1)
            pooled.append((softmax(scores, f.mask)[..., None] * y).sum(dim=1))
        else:
            pooled.append(mean(y, f.mask))
    return head.classifier(head.mix(torch.cat(pooled, dim=-1)))


def bottleneck(head: Any, given: Given) -> Tensor:
    size = len(next(iter(given.values())).mask)
    shared = head.bottlenecks.expand(size, -1, -1)
    x, mask = {}, {}
    for name, f in given.items():
        x[name] = torch.cat([head.class_tokens[name].expand(size, 1, -1), head.project[name](f.tokens)], dim=1)
        mask[name] = torch.cat([torch.ones_like(f.mask[:, :1]), f.mask], dim=1)
    everyone = torch.ones(size, shared.shape[1], dtype=torch.bool, device=shared.device)
    for layer in head.layers:
        said = []
        for name in x:
            y = self_layer(layer[name], torch.cat([x[name], shared], dim=1), torch.cat([mask[name], everyone], dim=1))
            x[name], own = y.split([x[name].shape[1], shared.shape[1]], dim=1)
            said.append(own)
        shared = torch.stack(said).mean(dim=0)
    return head.classifier(torch.stack([head.norm[name](x[name][:, 0]) for name in x]).mean(dim=0))


def perceiver(head: Any, given: Given) -> Tensor:
    tokens = torch.cat([head.project[name](f.tokens) + head.modality[name] for name, f in given.items()], dim=1)
    mask = torch.cat([f.mask for f in given.values()], dim=1)
    z = head.latents.expand(len(tokens), -1, -1)
    everyone = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)
    for read, think in zip(head.read_layers, head.think_layers, strict=True):
        z = self_layer(think, cross_layer(read, z, everyone, tokens, mask), everyone)
    return head.classifier(head.norm(z).mean(dim=1))


def adaptive_graph(head: Any, given: Given) -> Tensor:
    h = torch.cat([head.project[name](f.tokens) + head.modality[name] for name, f in given.items()], dim=1)
    mask = torch.cat([f.mask for f in given.values()], dim=1)
    unit = normalize(head.adjacency.embed(head.adjacency.norm(h)), dim=-1)
    edges = softmax(head.adjacency.log_sharpness.exp() * (unit @ unit.transpose(1, 2)), mask[:, None])
    for norm, convolve in zip(head.norm, head.convolve, strict=True):
        h = h + gelu(edges @ convolve(norm(h)))
    counts = [f.mask.shape[1] for f in given.values()]
    parts = zip(h.split(counts, dim=1), mask.split(counts, dim=1), strict=True)
    return head.classifier(head.mix(torch.cat([mean(part, real) for part, real in parts], dim=-1)))


def decisions(head: Any, given: Given) -> Tensor:
    return torch.stack([head.decide[name](f.pooled) for name, f in given.items()], dim=1)


def logit_mean(head: Any, given: Given) -> Tensor:
    return decisions(head, given).mean(dim=1)


def weighted_logits(head: Any, given: Given) -> Tensor:
    return (head.log_weights.softmax(dim=0)[:, None] * decisions(head, given)).sum(dim=1)


def product_of_experts(head: Any, given: Given) -> Tensor:
    return decisions(head, given).log_softmax(dim=-1).sum(dim=1).log_softmax(dim=-1)


def confidence_weighted(head: Any, given: Given) -> Tensor:
    logits = decisions(head, given)
    p = logits.softmax(dim=-1)
    sure = 1 + (p * p.log()).sum(dim=-1) / torch.tensor(float(logits.shape[-1])).log()
    return ((head.log_sharpness.exp() * sure).softmax(dim=1)[..., None] * logits).sum(dim=1)


def stacking(head: Any, given: Given) -> Tensor:
    p = decisions(head, given).softmax(dim=-1)
    return head.mix(torch.cat([p.flatten(1), torch.ones(p.shape[:2], device=p.device)], dim=-1))


def cross_attention(head: Any, given: Given) -> Tensor:
    x = {name: head.project[name](f.tokens) for name, f in given.items()}
    for layer in head.layers:
        new = {}
        for name, others in head.reads.items():
            context = torch.cat([x[other] for other in others], dim=1)
            mask = torch.cat([given[other].mask for other in others], dim=1)
            new[name] = cross_layer(layer[name], x[name], given[name].mask, context, mask)
        x = x | new
    return head.classifier(head.mix(torch.cat([mean(x[name], f.mask) for name, f in given.items()], dim=-1)))


def co_attention(head: Any, given: Given) -> Tensor:
    (a, one), (b, other) = given.items()
    x, y = head.project[a](one.tokens), head.project[b](other.tokens)
    for cross, own in zip(head.cross_layers, head.self_layers, strict=True):
        x, y = cross_layer(cross[a], x, one.mask, y, other.mask), cross_layer(cross[b], y, other.mask, x, one.mask)
        x, y = self_layer(own[a], x, one.mask), self_layer(own[b], y, other.mask)
    return head.classifier(head.pool[a](mean(head.norm[a](x), one.mask)) * head.pool[b](mean(head.norm[b](y), other.mask)))


def gated_cross_attention(head: Any, given: Given) -> Tensor:
    stream, condition = given[head.stream], given[head.condition]
    x = head.project[head.stream](stream.tokens)
    x = torch.cat([head.class_token.expand(len(x), 1, -1), x], dim=1)
    mask = torch.cat([torch.ones_like(stream.mask[:, :1]), stream.mask], dim=1)
    context = head.project[head.condition](condition.tokens)
    for cross, own in zip(head.cross_layers, head.self_layers, strict=True):
        x = self_layer(own, cross_layer(cross, x, mask, context, condition.mask), mask)
    return head.classifier(head.norm(x)[:, 0])


# By the name of the head's own module.
PLAIN: dict[str, Callable[[Any, Any], Tensor]] = {
    function.__name__: function
    for function in (
        joint_transformer,
        concat,
        residual_mlp,
        gated,
        film,
        tensor_fusion,
        low_rank_tensor,
        factorized_bilinear,
        mutan,
        embrace,
        level_weighted,
        squeeze_excite,
        bottleneck,
        perceiver,
        adaptive_graph,
        logit_mean,
        weighted_logits,
        product_of_experts,
        confidence_weighted,
        stacking,
        cross_attention,
        co_attention,
        gated_cross_attention,
    )
}
