"""No fusion across two groups of inputs: each is embedded by itself, into one space, for retrieval."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fusion.features import Features
from fusion.heads.base import FusionHead, FusionOutput, head_named

LARGEST_SCALE = 100.0  # of the logits, as in CLIP


class DualEncoder(FusionHead):
    """Embed two groups of inputs in one space, in which the inner product of a pair's two outputs is its logit.

        e = normalise(W pooled)            left = [sqrt(s) e_left, 1]            right = [sqrt(s) e_right, b]
        left . right = s cos(e_left, e_right) + b

    The output (B, 2 (D + 1)) holds left, then right; a side whose inputs are all absent is 0. The scale s = 1 / temperature is learned, and
    clamped to at most 100; the bias b is learned if given, else 0. A side of several inputs is fused by another head.

    Source: Radford et al. (2021), "Learning Transferable Visual Models From Natural Language Supervision" (CLIP); bias: Zhai et al. (2023),
    "Sigmoid Loss for Language Image Pre-Training" (SigLIP). Reads pooled features (B, D), or what the heads of its sides read. Cost:
    D * dim parameters for each side.

    Args:
        left: inputs of the first side; the first input at the default.
        right: inputs of the other side; all inputs that are not on the left at the default.
        projection: "linear" maps pooled features to the embedding; "none" takes them as they are (of CLIP's towers, which
            have a projection).
        fuse: the head that fuses a side of several inputs, a class of fusion.heads or a dotted name; without effect on a side of one input.
        fuse_args: its arguments.
        temperature: initial temperature; at least 0.01. CLIP's trained models have 0.01, SigLIP's training starts from 0.1.
        bias: initial bias of the logits, for the sigmoid loss, as -10 in SigLIP. None: none.

    >>> head = DualEncoder({"image": 8, "text": 16}, 2 * (4 + 1))
    >>> head({"image": torch.randn(3, 8), "text": torch.randn(3, 16)}).output.shape
    torch.Size([3, 10])
    """

    stage = "pooled"
    family = "none"

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
                fusing = head_named(fuse)(own, self.dim, **fuse_args or {})
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
        if any(isinstance(m, FusionHead) and m.stage == "tokens" for m in self.embedders.values()):
            self.stage = "tokens"  # type: ignore[assignment]
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))

    def output_layers(self) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for embedder in self.embedders.values():
            layers += (
                embedder.output_layers() if isinstance(embedder, FusionHead) else [embedder] if len(list(embedder.parameters())) else []
            )
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
        return FusionOutput(torch.cat(outputs, dim=1), {})

    def embed(self, side: str, features: dict[str, Features]) -> Tensor:
        """(B, dim) a side's embedding before normalisation."""
        names, embedder = self.sides[side], self.embedders[side]
        if isinstance(embedder, FusionHead):
            return embedder({name: features[name] for name in names}).output
        return embedder(features[names[0]].unshared().pooled)


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
