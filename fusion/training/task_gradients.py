"""GradNorm: weights of several tasks by the norms of their gradients."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fusion.encoders import Encoder
from fusion.tasks import MultiTask
from fusion.tasks.weighting import gradnorm_weights
from fusion.training.distributed.collectives import summed
from fusion.training.optim.precision import scaler_of


class OfTasks(Protocol):
    """What `TaskGradients` uses of the engine."""

    trainer: Any
    model: Any
    task: Any


class TaskGradients:
    """Sets the weights of a MultiTask once an update, from the gradients of its tasks' losses by the last layers of all encoders.

    Gradients are summed over accumulated batches and averaged over ranks before their norms are taken, so that the weights don't depend on
    how an update is divided. Costs a backward pass from the heads to those layers for each task.
    """

    def __init__(self) -> None:
        self.gradients: Tensor | None = None  # (T, P) of this update
        self.losses: Tensor | None = None  # (T,)

    def observe(self, engine: OfTasks, losses: Sequence[Tensor]) -> None:
        """Called before the backward pass of each batch, with each task's losses (B,)."""
        scaler, accumulated = scaler_of(engine.trainer.precision_plugin), engine.trainer.accumulate_grad_batches
        means = [loss.float().mean() for loss in losses]
        scale = 1.0 if scaler is None else scaler.scale(means[0].new_ones(()))
        shared = last_layers(engine.model)
        if not shared:  # frozen until a later update
            return
        rows = []
        for mean in means:
            gradients = torch.autograd.grad(mean * scale, shared, retain_graph=True, allow_unused=True)
            filled = (torch.zeros_like(p) if one is None else one for p, one in zip(shared, gradients, strict=True))
            rows.append(torch.cat([one.flatten().float() for one in filled]) / (scale * accumulated))
        flat, values = torch.stack(rows), torch.stack(means).detach() / accumulated
        self.gradients = flat if self.gradients is None else self.gradients + flat
        self.losses = values if self.losses is None else self.losses + values

    def update(self, engine: OfTasks) -> dict[str, Tensor]:
        """Set the weights for the next update; returns them by task, for the log."""
        task: MultiTask = engine.task
        if self.gradients is None or self.losses is None:
            return dict(zip(task.titles, task.weights, strict=True))
        world = engine.trainer.world_size
        norms, losses = (summed(self.gradients, world) / world).norm(dim=1), summed(self.losses, world) / world
        self.gradients = self.losses = None
        if None in task.initial:  # a loss of 0 is that of a task without samples in this update
            task.initial = [loss or None if known is None else known for known, loss in zip(task.initial, losses.tolist(), strict=True)]
        initial = torch.tensor([known or 1.0 for known in task.initial], device=losses.device)
        options = {"alpha": task.alpha, "lr": task.lr, "present": losses > 0}
        task.weights = gradnorm_weights(task.weights, norms, losses, initial, **options)
        return dict(zip(task.titles, task.weights, strict=True))


def last_layers(model: Any) -> list[Tensor]:
    """The trainable parameters of each encoder's last layer that has any."""
    found: list[Tensor] = []
    for encoder in model.encoders.values():
        assert isinstance(encoder, Encoder)
        layers, named = encoder.layers_of_parameters(), dict(encoder.named_parameters())
        trainable = {name: layer for name, layer in layers.items() if name in named and named[name].requires_grad}
        found += [named[name] for name, layer in trainable.items() if layer == max(trainable.values())]
    return found
