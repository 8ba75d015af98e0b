"""Plain PyTorch implementations of the heads' formulas, which use a head's own weights.

`fusion benchmark heads` compares speed and memory with them, and tests compare outputs. Values under a False mask are set to zero once, on
entry; from there on masks are applied as usual, by multiplication and by filling attention scores.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, normalize

from fusion.features import Features
from fusion.heads.joint_transformer import sinusoid

Given = dict[str, Features]


def plain_output(head: Any, given: Any) -> Tensor:
    """The head's output, computed by its plain implementation."""
    cleaned = {name: [clean(f, head.stage) for f in x] if isinstance(x, list) else clean(x, head.stage) for name, x in given.items()}
    return PLAIN[type(head).__module__.rpartition(".")[2]](head, cleaned)


def clean(f: Features, stage: str) -> Features:
    if stage in ("pooled", "levels"):
        return f._replace(pooled=f.pooled.masked_fill(~f.mask.any(dim=1, keepdim=True), 0.0))
    return f._replace(tokens=f.tokens.masked_fill(~f.mask[..., None], 0.0))


def there(f: Features) -> Tensor:
    """(B, 1): 1 where a sample has the modality, else 0."""
    return f.mask.any(dim=1, keepdim=True).float()


def presence(given: Given) -> Tensor:
    """(B, M, 1): 1 where a sample has the modality, else 0."""
    return torch.stack([there(f) for f in given.values()], dim=1)


def mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def softmax(scores: Tensor, mask: Tensor, dim: int = -1) -> Tensor:
    return scores.masked_fill(~mask, -1e9).softmax(dim=dim)


def attention(layer: Any, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
    def split(y: Tensor) -> Tensor:
        return y.view(*y.shape[:2], layer.num_heads, -1).transpose(1, 2)

    query, key, value = split(layer.query(x)), split(layer.key(context)), split(layer.value(context))
    weights = softmax(query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5, mask[:, None, None])
    return layer.out((weights @ value).transpose(1, 2).reshape(x.shape)) * mask.any(dim=1)[:, None, None]


def self_layer(layer: Any, x: Tensor, mask: Tensor) -> Tensor:
    normed = layer.norm_attention(x)
    x = x + attention(layer.attention, normed, normed, mask)
    return x + layer.feed_forward(layer.norm_feed_forward(x))


def cross_layer(layer: Any, x: Tensor, mask: Tensor, context: Tensor, context_mask: Tensor) -> Tensor:
    if layer.self_attention is not None:
        normed = layer.norm_self(x)
        x = x + attention(layer.self_attention, normed, normed, mask)
    attended = attention(layer.cross_attention, layer.norm_query(x), layer.norm_context(context), context_mask)
    x = x + (attended if layer.gate_attention is None else layer.gate_attention.tanh() * attended)
    update = layer.feed_forward(layer.norm_feed_forward(x))
    return x + (update if layer.gate_feed_forward is None else layer.gate_feed_forward.tanh() * update)


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
    return head.classifier(head.mix(torch.cat([head.norm[name](f.pooled) * there(f) for name, f in given.items()], dim=-1)))


def residual_mlp(head: Any, given: Given) -> Tensor:
    x = head.project(torch.cat([head.norm[name](f.pooled) * there(f) for name, f in given.items()], dim=-1))
    for block in head.blocks:
        x = x + block(x)
    return head.classifier(head.norm_joint(x))


def gated(head: Any, given: Given) -> Tensor:
    joint = torch.cat([f.pooled * there(f) for f in given.values()], dim=-1)
    z = softmax(torch.stack([head.gate[name](joint) for name in given], dim=1), presence(given) > 0, dim=1)
    h = torch.stack([head.candidate[name](f.pooled).tanh() for name, f in given.items()], dim=1)
    return head.classifier((z * h).sum(dim=1))


def film(head: Any, given: Given) -> Tensor:
    c = head.norm_condition(given[head.condition].pooled)
    x = head.project(head.norm_stream(given[head.stream].pooled)) * there(given[head.stream])
    for first, second, modulate in zip(head.first, head.second, head.modulate, strict=True):
        gamma, beta = (modulate(c) * there(given[head.condition])).chunk(2, dim=-1)
        h = torch.relu(first(x))
        y = second(h)
        x = h + torch.relu((gamma + 1) * layer_norm(y, y.shape[-1:]) + beta)
    return head.classifier(x)


def tensor_fusion(head: Any, given: Given) -> Tensor:
    joint = torch.ones(len(next(iter(given.values())).mask), 1, device=head.classifier.weight.device)
    for name, f in given.items():
        h = head.embed[name](f.pooled) * there(f)
        h = torch.cat([h, torch.ones(len(h), 1, device=h.device)], dim=-1)
        joint = torch.bmm(joint[:, :, None], h[:, None]).flatten(1)
    return head.classifier(head.mix(joint))


def low_rank_tensor(head: Any, given: Given) -> Tensor:
    product: Any = 1
    for name, f in given.items():
        x = head.norm[name](f.pooled) * there(f)
        x = torch.cat([x, torch.ones(len(x), 1, device=x.device)], dim=-1)
        factor = torch.cat([head.factor[name].weight, head.factor[name].bias[:, None]], dim=1).view(head.rank, -1, x.shape[1])
        product = product * torch.matmul(x, factor.transpose(1, 2))  # (rank, B, dim)
    return head.classifier(product.sum(dim=0))


def factorized_bilinear(head: Any, given: Given) -> Tensor:
    one, other = (head.factor[name](head.norm[name](f.pooled)).where(there(f) > 0, 1.0) for name, f in given.items())
    z = (one * other).view(len(one), -1, head.rank).sum(dim=-1)
    return head.classifier(normalize(z.sign() * z.abs().sqrt(), dim=-1))


def mutan(head: Any, given: Given) -> Tensor:
    factors = []
    for name, f in given.items():
        h = head.embed[name](f.pooled)
        parts = zip(head.factor[name].weight.chunk(head.rank), head.factor[name].bias.chunk(head.rank), strict=True)
        factors.append([(h @ weight.T + bias).where(there(f) > 0, 1.0) for weight, bias in parts])
    return head.classifier(torch.stack([one * other for one, other in zip(*factors, strict=True)]).sum(dim=0))


def aligned_product(head: Any, given: Given) -> Tensor:
    factors = []
    for name, f in given.items():
        u = head.project[name](f.pooled)
        factors.append((u * (u.square().mean(dim=-1, keepdim=True) + 1e-5).rsqrt()).where(there(f) > 0, 1.0))
    if head.interaction == "cross":
        return head.classifier(head.pre_output(torch.einsum("bi,bj->bij", *factors).flatten(1)))
    return head.classifier(head.pre_output(torch.stack(factors).prod(dim=0)))


def embrace(head: Any, given: Given) -> Tensor:
    docked = torch.stack([head.dock[name](f.pooled) for name, f in given.items()], dim=1)
    weights = presence(given)[..., 0] * head.probabilities
    if head.training:
        drawn = torch.multinomial(weights, docked.shape[-1], replacement=True)
        chosen = nn.functional.one_hot(drawn, len(given)).transpose(1, 2)
        return head.classifier(head.mix((docked * chosen).sum(dim=1)))
    return head.classifier(head.mix((docked * (weights / weights.sum(dim=1, keepdim=True))[..., None]).sum(dim=1)))


def level_weighted(head: Any, given: dict[str, list[Features]]) -> Tensor:
    h = {
        name: torch.stack([project(f.pooled) * there(f) for project, f in zip(head.project[name], levels, strict=True)], dim=1)
        for name, levels in given.items()
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
            pooled.append((softmax(scores, f.mask)[..., None] * y).sum(dim=1) * there(f))
        else:
            pooled.append(mean(y, f.mask))
    return head.classifier(head.mix(torch.cat(pooled, dim=-1)))


def bottleneck(head: Any, given: Given) -> Tensor:
    size = len(next(iter(given.values())).mask)
    shared = head.bottlenecks.expand(size, -1, -1)
    present = presence(given)
    x, mask = {}, {}
    for name, f in given.items():
        x[name] = torch.cat([head.class_tokens[name].expand(size, 1, -1), head.project[name](f.tokens)], dim=1)
        mask[name] = torch.cat([torch.ones_like(f.mask[:, :1]), f.mask], dim=1)
    everyone = torch.ones(size, shared.shape[1], dtype=torch.bool, device=shared.device)
    for layer in head.layers:
        copies = []
        for name in x:
            y = self_layer(layer[name], torch.cat([x[name], shared], dim=1), torch.cat([mask[name], everyone], dim=1))
            x[name], own = y.split([x[name].shape[1], shared.shape[1]], dim=1)
            copies.append(own)
        shared = (torch.stack(copies, dim=1) * present[..., None]).sum(dim=1) / present.sum(dim=1, keepdim=True)
    ends = torch.stack([head.norm[name](x[name][:, 0]) for name in x], dim=1)
    return head.classifier((ends * present).sum(dim=1) / present.sum(dim=1))


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


def interaction_experts(head: Any, given: Given) -> Tensor:
    logits = torch.stack([plain_output(expert, given) for expert in head.experts.values()], dim=1)
    weights = head.reweight(torch.cat([head.norm[name](f.pooled) * there(f) for name, f in given.items()], dim=-1)).softmax(dim=-1)
    if head.training:  # the head then computes these losses as well, whatever is done with them
        interaction_losses(head, given, logits)
    return (weights[..., None] * logits).sum(dim=1)


def interaction_losses(head: Any, given: Given, logits: Tensor) -> Tensor:
    present = presence(given)[..., 0]
    lacking = [given | {name: f._replace(mask=torch.zeros_like(f.mask))} for name, f in given.items()]
    losses = []
    for k, expert in enumerate(head.experts.values()):
        anchor = logits[:, k, None]
        others = torch.stack([plain_output(expert, one) for one in lacking], dim=1)
        if k < len(given):
            distance = (anchor - others + 1e-6).norm(dim=-1)
            weight = present * present[:, k, None]
            weight = torch.cat([weight[:, :k], torch.zeros_like(weight[:, :1]), weight[:, k + 1 :]], dim=1)
            values = torch.relu(distance - distance[:, k, None] + 1)
        else:
            cosine = nn.functional.cosine_similarity(anchor, others, dim=-1)
            values, weight = (cosine if k == len(given) else 1 - cosine), present
        losses.append((values * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1))
    return head.weight * torch.stack(losses).mean(dim=0) * (present.sum(dim=1) > 1)


def decisions(head: Any, given: Given) -> Tensor:
    return torch.stack([head.decide[name](f.pooled) for name, f in given.items()], dim=1)


def logit_mean(head: Any, given: Given) -> Tensor:
    present = presence(given)
    return (decisions(head, given) * present).sum(dim=1) / present.sum(dim=1)


def weighted_logits(head: Any, given: Given) -> Tensor:
    weights = softmax(head.log_weights[:, None].expand(len(presence(given)), -1, -1), presence(given) > 0, dim=1)
    return (weights * decisions(head, given)).sum(dim=1)


def product_of_experts(head: Any, given: Given) -> Tensor:
    return (decisions(head, given).log_softmax(dim=-1) * presence(given)).sum(dim=1).log_softmax(dim=-1)


def confidence_weighted(head: Any, given: Given) -> Tensor:
    logits = decisions(head, given)
    p = logits.softmax(dim=-1)
    confidence = 1 + (p * p.log()).sum(dim=-1) / torch.tensor(float(logits.shape[-1])).log()
    return (softmax(head.log_sharpness.exp() * confidence[..., None], presence(given) > 0, dim=1) * logits).sum(dim=1)


def predicted_confidence(head: Any, given: Given) -> Tensor:
    logits, present = decisions(head, given), presence(given)[..., 0]
    c = torch.cat([head.predict_confidence[name](f.pooled) for name, f in given.items()], dim=-1).sigmoid()
    losses = -c.log() * present
    total = losses.sum(dim=1, keepdim=True)
    holo = (total - losses) / total / (present.sum(dim=1, keepdim=True) - 1).clamp(min=1)
    distance = (logits.detach().softmax(dim=-1) - 1 / logits.shape[-1]).abs().mean(dim=-1) * present
    weights = softmax((c + holo) * distance / distance.amax(dim=1, keepdim=True), present > 0, dim=1)
    return (weights[..., None] * logits).sum(dim=1)


def stacking(head: Any, given: Given) -> Tensor:
    present = presence(given)
    log_p = decisions(head, given).softmax(dim=-1).log() * present
    return head.mix(torch.cat([log_p.flatten(1), present[..., 0]], dim=-1))


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
    pooled_one = head.pool[a](mean(head.norm[a](x), one.mask)).where(there(one) > 0, 1.0)
    pooled_other = head.pool[b](mean(head.norm[b](y), other.mask)).where(there(other) > 0, 1.0)
    return head.classifier(pooled_one * pooled_other)


def gated_cross_attention(head: Any, given: Given) -> Tensor:
    stream, condition = given[head.stream], given[head.condition]
    x = head.project[head.stream](stream.tokens)
    x = torch.cat([head.class_token.expand(len(x), 1, -1), x], dim=1)
    mask = torch.cat([torch.ones_like(stream.mask[:, :1]), stream.mask], dim=1)
    context = head.project[head.condition](condition.tokens)
    for cross, own in zip(head.cross_layers, head.self_layers, strict=True):
        x = self_layer(own, cross_layer(cross, x, mask, context, condition.mask), mask)
    return head.classifier(head.norm(x)[:, 0])


# By the name of the head's module.
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
        aligned_product,
        embrace,
        level_weighted,
        squeeze_excite,
        bottleneck,
        perceiver,
        adaptive_graph,
        interaction_experts,
        logit_mean,
        weighted_logits,
        product_of_experts,
        confidence_weighted,
        predicted_confidence,
        stacking,
        cross_attention,
        co_attention,
        gated_cross_attention,
    )
}
