"""Balancing of modalities: methods against one modality dominating the training of a multimodal model.

Each method gets the fused loss and each modality's own loss (of the head's `by_modality` predictions), and may change the gradients once an
update: after they are unscaled, summed over accumulated batches and averaged over ranks, and before they are clipped. All ranks do so
identically.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fusion.data.sampler import draw_seed
from fusion.errors import UserError
from fusion.model import FusionModel, part_of
from fusion.training.distributed.collectives import summed
from fusion.training.optim.precision import scaler_of


class Training(Protocol):
    """What a balancing method uses of the engine.

    modalities: in the head's order. updates: number made so far. sample_losses: by "fused" and modality, (n,) the loss of each sample of a
    split.
    """

    trainer: Any
    modalities: list[str]
    updates: int
    model: FusionModel | None

    def sample_losses(self, split: str, most: int | None = None) -> dict[str, Tensor]: ...


class Predictions(NamedTuple):
    """Each modality's own predictions for a training batch, by modality.

    sample (B,): number of the sample in train. by_modality (B, out_dim). losses (B,), 0 for samples without the modality. scores (B,): the
    probability that it gave to the true class. present (B,) bool. confidence (B,): the head's prediction of the scores, if it makes one.
    """

    sample: Tensor
    by_modality: dict[str, Tensor]
    losses: dict[str, Tensor]
    scores: dict[str, Tensor]
    present: dict[str, Tensor]
    confidence: dict[str, Tensor] | None


class Balance:
    """Base class of the methods; it doesn't change gradients.

    detached: whether the modalities' own predictions are computed from detached features, so that their losses don't train the encoders.
    """

    detached = False

    def begin(self, engine: Training) -> None:
        """Called once before training."""

    def total(self, fused: Tensor, alone: Mapping[str, Tensor]) -> Tensor:
        """The loss to minimise, from the fused loss and each modality's own loss, all scalars."""
        return fused + sum(alone.values())

    def regularisation(self, predictions: Predictions) -> Tensor | float:
        """A further loss of a batch, which is added to the total: a mean over its samples."""
        return 0.0

    def observe(self, engine: Training, alone: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> None:
        """Called before the backward pass of each batch, with each modality's own loss and (n,) the probability that it gave to the true
        class of each of the n samples that have it.
        """

    def modulate(self, engine: Training) -> dict[str, Any]:
        """Change the gradients of an update; returns the coefficients to log."""
        return {}

    def end_epoch(self, engine: Training) -> None:
        """Called on all ranks after every epoch and its validation."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class UnimodalLosses(Balance):
    """Adds the loss of each modality's own prediction: loss = L + sum_m weight_m L_m.

    Args:
        weight: weight of every modality's loss, or of each by modality; at least 0.
    """

    def __init__(self, weight: float | dict[str, float] = 1.0) -> None:
        self.weight = weight
        if any(not 0 <= w < math.inf for w in (weight.values() if isinstance(weight, dict) else [weight])):
            raise UserError(f"model.balance: weight is {weight}; expected numbers of at least 0")

    def begin(self, engine: Training) -> None:
        if isinstance(self.weight, dict) and self.weight.keys() != set(engine.modalities):
            raise UserError(f"model.balance: weight is for {', '.join(self.weight)}; the modalities are {', '.join(engine.modalities)}")

    def total(self, fused: Tensor, alone: Mapping[str, Tensor]) -> Tensor:
        weight = self.weight
        return fused + sum((weight[name] if isinstance(weight, dict) else weight) * loss for name, loss in alone.items())


class OGMGE(Balance):
    """Scales down the gradients of the modality that is ahead, and adds noise with the gradients' own standard deviation.

        s_m = mean probability that modality m alone gives to the true class        rho_m = s_m / mean of the others' s
        k_m = 1 - tanh(alpha * rho_m) where rho_m > 1, else 1        g_m <- k_m g_m + N(0, std(g_m)^2)

    Source: Peng et al. (2022), "Balanced Multimodal Learning via On-the-fly Gradient Modulation", for any number of modalities. There
    the unimodal predictions are the parts of one linear layer over concatenated features; here they are the modalities' own predictions:
    those of a late head, else of probes trained on detached features, so that any head can be balanced.

    Args:
        alpha: strength of the modulation, at least 0; 0 leaves the gradients unscaled.
        noise: add the noise (generalisation enhancement, GE).
        until_update: number of updates after which gradients are no longer changed. None: never.
    """

    detached = True

    def __init__(self, alpha: float = 0.3, noise: bool = True, until_update: int | None = None) -> None:
        if not 0 <= alpha < math.inf:
            raise UserError(f"model.balance: alpha is {alpha}; expected a number of at least 0")
        self.alpha, self.noise, self.until_update = alpha, noise, until_update
        self.sums: dict[str, Tensor] = {}
        self.probes = True

    def begin(self, engine: Training) -> None:
        assert engine.model is not None
        self.probes = engine.model.head.unimodal is not None

    def total(self, fused: Tensor, alone: Mapping[str, Tensor]) -> Tensor:
        return super().total(fused, alone) if self.probes else fused

    def observe(self, engine: Training, alone: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> None:
        for name, score in scores.items():
            total = score.detach().float().sum()
            added = torch.stack([total, torch.full_like(total, len(score))])
            self.sums[name] = self.sums[name] + added if name in self.sums else added

    def modulate(self, engine: Training) -> dict[str, Any]:
        sums = summed(torch.stack([self.sums[name] for name in engine.modalities]), engine.trainer.world_size)
        self.sums.clear()
        if self.until_update is not None and engine.updates >= self.until_update:
            return {}
        scores = sums[:, 0] / sums[:, 1].clamp(min=1)
        coefficients = dict(zip(engine.modalities, ogm_coefficients(scores, self.alpha), strict=True))
        generator: torch.Generator | None = None
        for name, p in with_gradient(engine).items():
            part = part_of(name)
            if part not in coefficients:
                continue
            assert p.grad is not None
            spread = p.grad.std() if self.noise and p.numel() > 1 else None
            p.grad.mul_(coefficients[part])
            if spread is not None:
                if generator is None:  # seeded by the update alone: the same on every rank, and in a resumed run
                    generator = torch.Generator(p.device).manual_seed(draw_seed(engine.trainer.datamodule.seed, engine.updates))
                p.grad.add_(torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype) * spread)
        return coefficients


def ogm_coefficients(scores: Tensor, alpha: float) -> Tensor:
    """Factor of each modality's gradients, (M,), on the scores' device and without synchronising with it.

    >>> ogm_coefficients(torch.tensor([0.8, 0.4]), alpha=0.3)
    tensor([0.4630, 1.0000])
    >>> ogm_coefficients(torch.full((4,), 0.4345911818720335), alpha=1.0)
    tensor([1., 1., 1., 1.])
    """
    exact = scores.double() if scores.device.type != "mps" else scores
    others = (exact.sum() - exact) / (len(scores) - 1)
    ratios = exact / others.clamp(min=1e-12)
    # Scores that differ only by the rounding of their mean count as equal.
    rounding = 1e-9 if exact.dtype == torch.float64 else 1e-6
    return torch.where(ratios > 1 + rounding, 1 - torch.tanh(alpha * ratios), torch.ones_like(ratios)).to(scores.dtype)


class MMPareto(Balance):
    """Combines each encoder's two gradients, of the fused loss (g) and of its modality's own loss (u), into a direction that reduces both.

        cos(g, u) >= 0:  a = 1/2        else:  a of the shortest a g + (1 - a) u        h = 2 a g + 2 (1 - a) u
        gradient <- gamma * h * max(1, |g + u| / |h|)

    Source: Wei and Hu (2024), "MMPareto: Boosting Multimodal Learning with Innocent Unimodal Assistance", over each encoder's parameters
    as one vector. Costs a second backward pass through the encoders.

    Args:
        gamma: factor of the combined gradient, above 0; values above 1 restore the gradient noise that combining reduces.
    """

    def __init__(self, gamma: float = 1.5) -> None:
        if not 0 < gamma < math.inf:
            raise UserError(f"model.balance: gamma is {gamma}; expected a number above 0")
        self.gamma = gamma
        self.own: dict[str, Tensor] = {}

    def observe(self, engine: Training, alone: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> None:
        scaler = scaler_of(engine.trainer.precision_plugin)
        # Scaled so that small gradients don't vanish in fp16; a tensor, so that the host doesn't wait for the device.
        scale = 1.0 if scaler is None else scaler.scale(next(iter(alone.values())).new_ones(()))
        for modality, loss in alone.items():
            parameters = self.encoder_parameters(engine, modality)
            if not parameters:
                continue
            # torch.autograd.grad doesn't write .grad, nor does it run DDP's hooks.
            gradients = torch.autograd.grad(loss * scale, parameters, retain_graph=True, allow_unused=True)
            filled = (torch.zeros_like(p) if gradient is None else gradient for p, gradient in zip(parameters, gradients, strict=True))
            flat = torch.cat([gradient.flatten() for gradient in filled]) / (scale * engine.trainer.accumulate_grad_batches)
            self.own[modality] = self.own[modality] + flat if modality in self.own else flat

    def modulate(self, engine: Training) -> dict[str, Any]:
        coefficients: dict[str, Any] = {}
        for modality in engine.modalities:
            if modality not in self.own:
                continue
            parameters = self.encoder_parameters(engine, modality)
            own = summed(self.own[modality], engine.trainer.world_size) / engine.trainer.world_size
            both = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
            coefficient, combined = pareto(both - own, own, self.gamma)
            coefficients[modality] = coefficient
            for p, gradient in zip(parameters, combined.split([p.numel() for p in parameters]), strict=True):
                # Fused optimisers need the gradient in the memory layout of its parameter (channels last).
                p.grad = torch.empty_like(p).copy_(gradient.view_as(p))
        self.own.clear()
        return coefficients

    def encoder_parameters(self, engine: Training, modality: str) -> list[Tensor]:
        assert engine.model is not None
        return [p for p in engine.model.encoders[modality].parameters() if p.requires_grad]


def pareto(fused: Tensor, own: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """The coefficient a of the fused gradient, and the combined gradient, from two flat gradients; on their device, without synchronising.

    >>> pareto(torch.tensor([2.0, 0.0]), torch.tensor([-1.0, 1.0]), gamma=1.0)[0]
    tensor(0.4000)
    """
    product, a, b = fused @ own, fused @ fused, own @ own
    # The shortest a g + (1 - a) u where the gradients conflict; a of 0 or 1 is one of them alone.
    shortest = ((b - product) / (a + b - 2 * product)).clamp(0, 1)
    coefficient = torch.where(product < 0, shortest, torch.full_like(product, 0.5))
    combined = 2 * coefficient * fused + 2 * (1 - coefficient) * own
    length = combined.norm()
    # For opposite gradients no direction reduces both losses: h is then only rounding error, which must not be enlarged.
    factor = torch.where(length > 1e-6 * (a + b).sqrt(), ((fused + own).norm() / length).clamp(min=1), torch.ones_like(length))
    return coefficient, gamma * factor * combined


class GradientBlending(Balance):
    """Weights the fused loss and each modality's own loss by their generalisation relative to their overfitting.

        G_k = decrease of its loss on val        O_k = increase of its gap, val minus train        w_k = G_k / O_k^2, normalised to sum 1

    each from one measurement to the next, on val and on as many samples of train, in evaluation mode. Losses that don't decrease on val get
    weight 0; where none decreases, and until the second measurement, all weights are equal.

    Source: Wang et al. (2020), "What Makes Training Multi-Modal Classification Networks Hard?", the online variant, measured during the
    joint training itself (in the paper each super-epoch trains copies of the unimodal models separately). The weights depend on val:
    scores on val are no longer those of unseen data.

    Args:
        every: number of epochs from one measurement to the next, at least 1.
    """

    FUSED = "fused"

    def __init__(self, every: int = 1) -> None:
        if every < 1:
            raise UserError(f"model.balance: every is {every}; expected at least one epoch")
        self.every = every
        self.weights: dict[str, float] = {}
        self.before: dict[str, list[float]] = {}

    def begin(self, engine: Training) -> None:
        if "val" not in engine.trainer.datamodule.splits:
            raise UserError("model.balance: gradient blending weights losses by their decrease on a val split; there is none")

    def total(self, fused: Tensor, alone: Mapping[str, Tensor]) -> Tensor:
        losses = {self.FUSED: fused, **alone}
        return sum((self.weights.get(name, 1 / len(losses)) * loss for name, loss in losses.items()), start=torch.zeros_like(fused))

    def modulate(self, engine: Training) -> dict[str, Any]:
        return dict(self.weights)

    def end_epoch(self, engine: Training) -> None:
        if (engine.trainer.current_epoch + 1) % self.every:
            return
        most = len(engine.trainer.datamodule.splits["val"].samples)
        losses = [engine.sample_losses(split, most) for split in ("train", "val")]
        now = {name: [float(of_split[name].nanmean()) for of_split in losses] for name in losses[0]}
        if self.before:
            self.weights = blending_weights(self.before, now)
        self.before = now

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights, self.before = state["weights"], state["before"]


def blending_weights(before: Mapping[str, list[float]], now: Mapping[str, list[float]]) -> dict[str, float]:
    """Weight of each loss, from its values on [train, val] at two measurements.

    >>> weights = blending_weights({"a": [1.0, 1.0], "b": [1.0, 1.0]}, {"a": [0.8, 0.9], "b": [0.6, 0.9]})
    >>> {name: round(weight, 3) for name, weight in weights.items()}
    {'a': 0.9, 'b': 0.1}
    """
    ratio = {}
    for name, (train, val) in now.items():
        fall = before[name][1] - val
        overfit = (val - train) - (before[name][1] - before[name][0])
        ratio[name] = max(0.0, fall) / max(overfit**2, 1e-8)
    total = sum(ratio.values())
    return {name: value / total if total else 1 / len(ratio) for name, value in ratio.items()}


def with_gradient(engine: Training) -> dict[str, Tensor]:
    """The model's parameters that have a gradient, by name."""
    assert engine.model is not None
    return {name: p for name, p in engine.model.named_parameters() if p.grad is not None}
