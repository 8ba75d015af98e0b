"""Intermediate fusion: a mixture of experts, each any fusion head, for what is unique, synergistic and redundant in the modalities."""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, pairwise_distance

from fusion.features import Features, as_one_token, keep, presence, promote
from fusion.heads.base import FusionHead, FusionOutput, Stage, check_options
from fusion.heads.by_name import head_named, nearest_name

MARGIN = 1.0  # of the triplet loss, as in the paper


class InteractionExperts(FusionHead):
    """Train one expert for each kind of interaction between the modalities, and weight their predictions by the sample.

        y = sum_e w_e f_e(x)            w = softmax(W_2 GELU(W_1 [norm(x_1); ...; norm(x_M)]))            e in 1 ... M, synergy, redundancy

    Each f_e is a fusion head of the same kind. In training it also predicts without each modality, f_e(x_-m), which is then masked, and a
    loss on these predictions, without labels, makes it the expert of one interaction:

        l_m = mean over j of max(0, |f_m(x) - f_m(x_-j)| - |f_m(x) - f_m(x_-m)| + 1)            its prediction changes most without m
        l_synergy = mean over m of cos(f_e(x), f_e(x_-m))            l_redundancy = mean over m of 1 - cos(f_e(x), f_e(x_-m))

    over the modalities that a sample has; a sample with only one has no such loss. `auxiliary` is their mean over the experts, times
    `weight`; the engine adds it to the loss. (The paper replaces a modality by noise; here every head takes a mask.)

    Source: Xin et al. (2025), "I2MoE: Interpretable Multimodal Interaction-aware Mixture-of-Experts".
    Reads: what the experts read, tokens (B, N_m, D_m) or pooled features (B, D_m); the weights depend on pooled features.
    Cost: (M + 2) times that of an expert, in training (M + 1) * (M + 2) times, and (sum(D_m) + M + 2) * dim for the weights.

    Args:
        expert: name of the fusion head that each expert is, such as Concat or CrossAttention; or its class path.
        expert_args: arguments of the experts.
        weight: weight of the losses of the interactions; at least 0.
        dim: hidden width of the network that weights the experts, and dim of the experts where expert_args has none.
        dropout: dropout probability in that network, and of the experts where expert_args has none; from 0 to below 1.
        unimodal: also predict from each modality alone, by a linear layer on its pooled features (by_modality); model.balance turns it on.

    >>> head = InteractionExperts({"text": 8, "image": 16}, 3, expert="CrossAttention", expert_args={"depth": 1}, dim=32)
    >>> head({"text": torch.randn(4, 7, 8), "image": torch.randn(4, 49, 16)}).auxiliary.shape
    torch.Size([4])
    """

    stage: Stage = "pooled"  # that of the experts in an instance
    family = "intermediate"
    fewest_outputs = 2  # the cosine of single numbers is that of their signs

    def __init__(
        self,
        dims: Mapping[str, Any],
        out_dim: int,
        *,
        expert: str = "Concat",
        expert_args: dict[str, Any] | None = None,
        weight: float = 0.1,
        dim: int = 256,
        dropout: float = 0.0,
        unimodal: bool = False,
    ) -> None:
        check_options(type(self).__name__, dim=dim, dropout=dropout)
        if not 0 <= weight < math.inf:
            raise ValueError(f"InteractionExperts: weight is {weight}; expected a number of at least 0")
        cls = head_named(expert, "InteractionExperts: unknown expert")
        options = expert_options(cls, {"dim": dim, "dropout": dropout}, expert_args or {})
        experts = {name: cls(dims, out_dim, **options) for name in [*(f"unique_{m}" for m in dims), "synergy", "redundancy"]}
        first = experts["synergy"]
        super().__init__(first.dims, out_dim, width=None, unimodal=unimodal)
        self.stage, self.level_dims, self.one_of_classes = first.stage, first.level_dims, first.one_of_classes
        self.experts = nn.ModuleDict(experts)
        self.weight = weight
        self.norm = nn.ModuleDict({name: nn.LayerNorm(width) for name, width in self.dims.items()})
        self.reweight = nn.Sequential(nn.Linear(sum(self.dims.values()), dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(dim, len(experts)))

    def forward(self, features: Mapping[str, Features | Tensor | Sequence[Features | Tensor]]) -> FusionOutput:
        given = {name: promoted(f) for name, f in features.items()}
        outputs = {name: expert(given) for name, expert in self.experts.items()}  # rejects features that don't fit
        pooled = {name: as_one_token(last_level(given[name])) for name in self.dims}
        logits = torch.stack([output.output for output in outputs.values()], dim=1)  # (B, M + 2, C)
        output = (self.weights(pooled).unsqueeze(-1).to(logits.dtype) * logits).sum(dim=1)
        return FusionOutput(output, self.predict_alone(pooled), self.interaction_losses(given, outputs, presence(pooled)))

    def weights(self, pooled: dict[str, Features]) -> Tensor:
        """The weights (B, M + 2) of the experts, which sum to 1, from each modality's pooled features."""
        joint = torch.cat([keep(self.norm[name](f.pooled), f.present) for name, f in pooled.items()], dim=-1)
        return self.reweight(joint).softmax(dim=-1)

    def output_layers(self) -> list[nn.Module]:
        experts = [layer for expert in self.experts.values() if isinstance(expert, FusionHead) for layer in expert.output_layers()]
        return [*experts, *super().output_layers()]

    def interaction_losses(
        self, given: dict[str, Features | list[Features]], outputs: Mapping[str, FusionOutput], present: Tensor
    ) -> Tensor | None:
        """The weighted losses (B,) of the interactions, and those of the experts themselves; None in evaluation."""
        if not self.training:
            return None
        masked = [given | {name: without(given[name])} for name in self.dims]
        losses = []
        for k, (name, expert) in enumerate(self.experts.items()):
            # In float32 at least: the distances of fp16 predictions are too coarse, and their squares overflow.
            anchor = in_single(outputs[name].output)
            others = [in_single(expert(one).output) for one in masked]
            if k < len(self.dims):
                losses.append(unique_loss(anchor, others, present, k))
            else:
                cosines = torch.stack([cosine_similarity(anchor, other, dim=-1, eps=1e-4) for other in others], dim=1)
                losses.append(mean_where(cosines if name == "synergy" else 1 - cosines, present))
        several = present.sum(dim=1) > 1
        total = self.weight * torch.where(several, torch.stack(losses).mean(dim=0), 0.0)
        own = [output.auxiliary for output in outputs.values() if output.auxiliary is not None]
        return total + torch.stack(own).mean(dim=0) if own else total


def unique_loss(anchor: Tensor, others: list[Tensor], present: Tensor, own: int) -> Tensor:
    """Triplet losses (B,) of predictions (B, C) with all modalities, and without each: closer to those without another than to that
    without the `own` one; 0 where a sample lacks the latter."""
    # (The epsilon of pairwise_distance keeps the gradient finite where both are equal.)
    distances = torch.stack([pairwise_distance(anchor, other) for other in others], dim=1)  # (B, M)
    hinges = (distances - distances[:, own, None] + MARGIN).clamp(min=0)
    other_modalities = torch.arange(present.shape[1], device=present.device) != own
    return mean_where(hinges, present & present[:, own, None] & other_modalities)


def mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """Mean (B,) of the values (B, M) where `mask` is True; 0 where it is nowhere."""
    return torch.where(mask, values, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def in_single(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def promoted(x: Features | Tensor | Sequence[Features | Tensor]) -> Features | list[Features]:
    return promote(x) if isinstance(x, Features | Tensor) else [promote(level) for level in x]


def last_level(x: Features | list[Features]) -> Features:
    return x[-1] if isinstance(x, list) else x


def without(x: Features | list[Features]) -> Features | list[Features]:
    """A modality's features, or levels of them, masked for all samples."""
    if isinstance(x, list):
        return [f._replace(mask=torch.zeros_like(f.mask), full=None) for f in x]
    return x._replace(mask=torch.zeros_like(x.mask), full=None)


def expert_options(cls: type[FusionHead], common: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the experts: those given, and the common ones that the class takes. Raises ValueError for those given that it
    doesn't take."""
    parameters = inspect.signature(cls.__init__).parameters
    accepted = [name for name in list(parameters)[1:] if name not in ("dims", "out_dim")]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        accepted += given
    if unknown := next((name for name in given if name not in accepted), None):
        raise ValueError(
            f"InteractionExperts: expert_args has '{unknown}', which {cls.__name__} doesn't take; {nearest_name(unknown, accepted)}"
        )
    return {name: value for name, value in common.items() if name in accepted} | given
