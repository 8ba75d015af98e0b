"""No fusion across two groups of inputs: each is embedded by itself, into one space, for retrieval."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, normalize

from fusion.features import Features, masked_softmax
from fusion.heads.base import FusionHead, FusionOutput
from fusion.heads.by_name import head_named

LARGEST_SCALE = 100.0  # of the logits, as in CLIP


class DualEncoder(FusionHead):
    """Embed two groups of inputs in one space, in which the inner product of a pair's two outputs is its logit.

        e = normalise(W pooled)            left = [sqrt(s) e_left, 1]            right = [sqrt(s) e_right, b]
        left . right = s cos(e_left, e_right) + b

    The output (B, 2 (D + 1)) holds left, then right; a side whose inputs are all absent is 0. The scale s = 1 / temperature is learned, and
    clamped to at most 100; the bias b is learned if given, else 0. A side of several inputs is fused by another head.

    A matcher is a fusion head that reads both sides of a pair and decides whether they belong together, more precisely than embeddings
    made apart can: it re-ranks the first candidates of a search (`match`). Its loss is the binary cross entropy of each pair of the batch
    and of two hard negatives, drawn by softmax of the logits from the batch's other right, and other left, items; it is added as
    `auxiliary`.

    Source: Radford et al. (2021), "Learning Transferable Visual Models From Natural Language Supervision" (CLIP); bias: Zhai et al. (2023),
    "Sigmoid Loss for Language Image Pre-Training" (SigLIP); matcher: Li et al. (2021), "Align before Fuse" (ALBEF).
    Reads: pooled features (B, D), or what its other heads read.
    Cost: D * dim parameters for each side; in training with a matcher, three times its cost.

    Args:
        left: inputs of the first side; the first input at the default.
        right: inputs of the other side; all inputs that are not on the left at the default.
        projection: "linear" maps pooled features to the embedding; "none" takes them as they are (of CLIP's towers, which
            have a projection).
        fuse: the head that fuses a side of several inputs, a class of fusion.heads or a dotted name; without effect on a side of one input.
        fuse_args: its arguments.
        temperature: initial temperature; at least 0.01. CLIP's trained models have 0.01, SigLIP's training starts from 0.1.
        bias: initial bias of the logits, for the sigmoid loss, as -10 in SigLIP. None: none.
        matcher: the head that matches pairs, a class of fusion.heads or a dotted name. None: none.
        matcher_args: its arguments.
        matching_weight: factor of the matching loss; above 0.

    >>> head = DualEncoder({"image": 8, "text": 16}, 2 * (4 + 1))
    >>> head({"image": torch.randn(3, 8), "text": torch.randn(3, 16)}).output.shape
    torch.Size([3, 10])
    """

    stage = "pooled"
    family = "none"
    embeds_pairs = True

    def __init__(
        self,
        dims: Mapping[str, int],
        out_dim: int,
        *,
        left: Sequence[str] | None = None,
        right: Sequence[str] | None = None,
        projection: Literal["linear", "none"] = "linear",
        fuse: str = "Concat",
        fuse_args: dict[str, Any] | None = None,
        temperature: float = 0.07,
        bias: float | None = None,
        matcher: str | None = None,
        matcher_args: dict[str, Any] | None = None,
        matching_weight: float = 1.0,
    ) -> None:
        super().__init__(dims, out_dim, width=None)
        if out_dim < 4 or out_dim % 2:
            raise ValueError(f"DualEncoder: out_dim is {out_dim}; expected 2 * (dim + 1), as the task Retrieval has")
        self.dim = out_dim // 2 - 1
        self.sides = sides_of(list(dims), left, right)
        if projection not in ("linear", "none"):
            raise ValueError(f"DualEncoder: projection is '{projection}'; expected linear or none")
        if not 1 / LARGEST_SCALE <= temperature < math.inf:
            raise ValueError(f"DualEncoder: temperature is {temperature}; expected at least {1 / LARGEST_SCALE}, below which it overflows")
        if bias is not None and not math.isfinite(bias):
            raise ValueError(f"DualEncoder: bias is {bias}; expected a finite number, or null for none")
        self.embedders = nn.ModuleDict()
        for side, names in self.sides.items():
            if len(names) > 1:
                own = {name: dims[name] for name in names}
                fusing = head_named(fuse, "DualEncoder: unknown head")(own, self.dim, **fuse_args or {})
                if fusing.stage not in ("tokens", "pooled"):
                    raise ValueError(
                        f"DualEncoder: fuse is {fuse}, which reads {fusing.stage}; expected a head that reads tokens or pooled"
                    )
                self.embedders[side] = fusing
            elif projection == "linear":
                self.embedders[side] = nn.Linear(dims[names[0]], self.dim, bias=False)
            elif dims[names[0]] == self.dim:
                self.embedders[side] = nn.Identity()
            else:
                raise ValueError(
                    f"DualEncoder: without projection the embedding has the width of '{names[0]}', {dims[names[0]]}, but the task asks "
                    f"for {self.dim}; set the task's dim to {dims[names[0]]}, or projection to linear"
                )
        self.matcher = None if matcher is None else head_named(matcher, "DualEncoder: unknown head")(dims, 1, **matcher_args or {})
        if self.matcher is not None and self.matcher.stage not in ("tokens", "pooled"):
            raise ValueError(
                f"DualEncoder: matcher is {matcher}, which reads {self.matcher.stage}; expected a head that reads tokens or pooled"
            )
        if not 0 < matching_weight < math.inf:
            raise ValueError(f"DualEncoder: matching_weight is {matching_weight}; expected a number above 0")
        self.matching_weight = matching_weight
        if any(isinstance(m, FusionHead) and m.stage == "tokens" for m in (*self.embedders.values(), self.matcher)):
            self.stage = "tokens"  # type: ignore[assignment]
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))

    def output_layers(self) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for part in (*self.embedders.values(), *([] if self.matcher is None else [self.matcher])):
            if isinstance(part, FusionHead):
                layers += part.output_layers()
            elif isinstance(part, nn.Linear):
                layers.append(part)
        return layers

    @property
    def temperature(self) -> float:
        """The current temperature, 1 / scale."""
        return float((-self.log_scale.detach()).exp().clamp(min=1 / LARGEST_SCALE))

    def forward(self, features: Mapping[str, Features | Tensor]) -> FusionOutput:
        clean = self.read(features)
        root = (limited(self.log_scale.float(), math.log(LARGEST_SCALE)) / 2).exp()
        outputs = []
        for side in self.sides:
            embedding = normalize(self.embed(side, clean).float(), dim=1) * root
            last = torch.ones_like(embedding[:, :1])
            if side == "right":
                last = last * (0.0 if self.bias is None else self.bias.float())
            present = torch.stack([clean[name].present for name in self.sides[side]], dim=1).any(dim=1)
            outputs.append(torch.where(present[:, None], torch.cat([embedding, last], dim=1), 0.0))
        auxiliary = self.matching_loss(clean, *outputs) if self.training and self.matcher is not None else None
        return FusionOutput(torch.cat(outputs, dim=1), {}, auxiliary)

    def match(self, features: Mapping[str, Features | Tensor]) -> Tensor:
        """The matcher's logits (B,) of pairs, as `forward` takes them."""
        assert self.matcher is not None
        return self.matcher(features).output[:, 0]

    def matching_loss(self, features: dict[str, Features], left: Tensor, right: Tensor) -> Tensor:
        """The weighted matching loss (B,) of pairs, from their features and outputs (B, D + 1); 0 for a pair that lacks a side."""
        complete = (left.detach() != 0).any(dim=1) & (right.detach() != 0).any(dim=1)
        logits = left.detach().float() @ right.detach().float().T
        possible = complete[:, None] & complete & ~torch.eye(len(left), dtype=torch.bool, device=left.device)
        own = torch.arange(len(left), device=left.device)
        pairs, counted = [(own, own)], [complete]
        for scores, negatives in ((logits, "right"), (logits.T, "left")):
            chances = masked_softmax(scores, possible, dim=1)
            has_any = possible.any(dim=1)
            # Features that aren't finite give no chances; the loss isn't finite then either, which is noticed elsewhere.
            drawable = (has_any & chances.isfinite().all(dim=1))[:, None]
            drawn = torch.multinomial(torch.where(drawable, chances, 1.0), 1)[:, 0]
            pairs.append((own, drawn) if negatives == "right" else (drawn, own))
            counted.append(has_any)
        index = {side: torch.cat([pair[i] for pair in pairs]) for i, side in enumerate(("left", "right"))}
        chosen = {name: rows_of(features[name], index[side]) for side, names in self.sides.items() for name in names}
        found = self.match({name: chosen[name] for name in self.dims}).float()
        target = torch.zeros_like(found)
        target[: len(own)] = 1
        losses = binary_cross_entropy_with_logits(found, target, reduction="none").view(3, -1)
        counts = torch.stack(counted)
        return self.matching_weight * torch.where(counts, losses, 0.0).sum(dim=0) / counts.sum(dim=0).clamp(min=1)

    def embed(self, side: str, features: dict[str, Features]) -> Tensor:
        """(B, dim) a side's embedding before normalisation."""
        names, embedder = self.sides[side], self.embedders[side]
        if isinstance(embedder, FusionHead):
            return embedder({name: features[name] for name in names}).output
        return embedder(features[names[0]].unshared().pooled)


def rows_of(features: Features, index: Tensor) -> Features:
    """The features of these samples."""
    own = features.unshared()
    tokens, mask, pooled = (x.index_select(0, index) for x in (own.tokens, own.mask, own.pooled))
    return Features(tokens, mask, pooled, full=own.full)


class Limited(torch.autograd.Function):
    """min(x, limit), with the gradient of x where that moves it back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limit = limit
        return x.clamp(max=limit)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.where((x <= ctx.limit) | (gradient > 0), gradient, 0.0), None


def limited(x: Tensor, limit: float) -> Tensor:
    """x up to a limit that it doesn't cross in training, and from which it can return, as it could not by `clamp`."""
    return Limited.apply(x, limit)


def sides_of(names: Sequence[str], left: Sequence[str] | None, right: Sequence[str] | None) -> dict[str, list[str]]:
    """The inputs of both sides. Raises ValueError unless each of `names` is on one side.

    >>> sides_of(["image", "title", "facts"], None, None)
    {'left': ['image'], 'right': ['title', 'facts']}
    """
    if left is None:
        left = names[:1] if right is None else [name for name in names if name not in right]
    one = list(left)
    other = list(right) if right is not None else [name for name in names if name not in one]
    if not one or not other or sorted([*one, *other]) != sorted(names):
        raise ValueError(
            f"two sides are needed, each input on one of them: left is {one}, right {other}, the inputs are {', '.join(names)}"
        )
    return {"left": one, "right": other}
