"""One head for each of several tasks, over shared encoders."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusion.features import Features
from fusion.heads.base import FusionHead, FusionOutput
from fusion.heads.by_name import head_named


class PerTask(FusionHead):
    """Concatenate the outputs of one head for each task.

        y = [head_1(x), ..., head_T(x)] and, with log_variances, [s_1, ..., s_T]

    The log variances are learned numbers, the same for all samples, for weighting by uncertainty (Kendall et al., 2018). Made by the engine
    for the task MultiTask. Reads what its heads read. Cost: the sum of theirs.

    Args:
        heads: of each task, the class of its head (of fusion.heads, or a dotted name), its arguments, and its number of outputs.
        log_variances: whether to append them.

    >>> heads = [{"head": "Concat", "args": {"dim": 8}, "out_dim": 2}, {"head": "Gated", "args": {}, "out_dim": 3}]
    >>> PerTask({"text": 8, "image": 16}, 5, heads=heads)({"text": torch.randn(4, 8), "image": torch.randn(4, 16)}).output.shape
    torch.Size([4, 5])
    """

    stage = "pooled"
    family = "none"

    def __init__(self, dims: Mapping[str, Any], out_dim: int, *, heads: Sequence[Mapping[str, Any]], log_variances: bool = False) -> None:
        nn.Module.__init__(self)  # the heads check the widths
        self.heads = nn.ModuleList()
        classes = [head_named(one["head"], "PerTask: unknown head") for one in heads]
        for one, cls in zip(heads, classes, strict=True):
            self.heads.append(cls(dims, one["out_dim"], **one["args"]))
        stages: set[Any] = {head.stage for head in self.heads}
        # A head that reads pooled features pools the tokens that another one reads.
        self.stage = "tokens" if stages == {"tokens", "pooled"} else next(iter(stages))  # type: ignore[assignment]
        if len(stages) > 1 and self.stage != "tokens":
            names = ", ".join(f"{type(head).__name__} reads {head.stage}" for head in self.heads)
            raise ValueError(f"PerTask: the heads of several tasks read the same features of each encoder, but {names}")
        first: Any = self.heads[0]
        self.dims, self.level_dims, self.out_dim = first.dims, first.level_dims, out_dim
        self.classifier = self.unimodal = None
        self.detached = False
        self.log_variance = nn.Parameter(torch.zeros(len(heads))) if log_variances else None
        expected = sum(one["out_dim"] for one in heads) + (len(heads) if log_variances else 0)
        if out_dim != expected:
            raise ValueError(f"PerTask: out_dim is {out_dim}; the heads have {expected} outputs")

    def forward(self, features: Mapping[str, Features | Tensor]) -> FusionOutput:
        results: list[FusionOutput] = [head(features) for head in self.heads]
        outputs = [one.output for one in results]
        auxiliary = [one.auxiliary for one in results if one.auxiliary is not None]
        if self.log_variance is not None:
            outputs.append(self.log_variance.expand(len(outputs[0]), -1))
        widest = max(outputs, key=lambda output: torch.finfo(output.dtype).bits)
        return FusionOutput(
            torch.cat([output.to(widest.dtype) for output in outputs], dim=1), {}, torch.stack(auxiliary).sum(dim=0) if auxiliary else None
        )

    def output_layers(self) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for head in self.heads:
            assert isinstance(head, FusionHead)
            layers += head.output_layers()
        return layers
