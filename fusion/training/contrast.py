"""Losses that compare all samples of an update, exact over accumulated batches and ranks, by caching the gradients of the outputs."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fusion.data.samples import Batch
from fusion.tasks import Task
from fusion.tasks.base import Pool
from fusion.training.distributed.collectives import gathered, summed

CHUNK_VALUES = 2**19  # logits computed at once


class Contrasting(Protocol):
    """What `Contrast` uses of the engine."""

    trainer: Any
    task: Task
    model: Any

    @property
    def device(self) -> torch.device: ...

    def forward_with_dropout(self, inputs: dict[str, Any]) -> Any: ...


class Contrast:
    """The loss of one update over the outputs of all its samples, as a loss for each accumulated batch.

    At the first accumulated batch of an update the outputs of all of them are computed, without keeping their activations, and gathered
    over the ranks; the gradient of the update's mean loss by this rank's outputs is stored. Each batch then returns the product of its
    outputs with their gradients, whose backward pass equals that of the loss over the whole update. Dropout is the same in both passes.
    With one batch an update nothing is computed twice.

    Source: Gao et al. (2021), "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (GradCache).
    """

    def __init__(self) -> None:
        self.gradients: tuple[Tensor, ...] = ()
        self.losses: tuple[Tensor, ...] = ()
        self.random_states: list[list[Tensor]] = []

    def step(self, engine: Contrasting, batch: Batch, batch_idx: int) -> tuple[Tensor, Tensor]:
        """The output of an accumulated batch, and its loss: the value is the mean loss of its samples among all of the update."""
        accumulated = engine.trainer.accumulate_grad_batches
        number = batch_idx % accumulated
        if accumulated > 1:
            if number == 0:
                self.look_ahead(engine, batch)
            set_random_state(engine.device, self.random_states[number])
        found = engine.forward_with_dropout(batch.inputs)[0]
        if accumulated == 1:
            self.differentiate(engine, (found.output.detach(),), (batch.target,))
        product = (found.output * self.gradients[number]).sum() * accumulated  # since the mean is taken over the accumulated batches
        loss = product - product.detach() + self.losses[number].mean()
        return found.output, loss if found.auxiliary is None else loss + found.auxiliary.mean()

    def look_ahead(self, engine: Contrasting, batch: Batch) -> None:
        """Compute the outputs of all batches of the update, and the gradient of its loss by them."""

        def output_and_target(one: Batch) -> tuple[Tensor, Tensor]:
            moved = batch if one is batch else engine.trainer.strategy.batch_to_device(one, engine.device)
            self.random_states.append(random_state(engine.device))
            # With gradients, though they aren't used: a compiled model draws the same dropout in the same graph only.
            return engine.forward_with_dropout(moved.inputs)[0].output.detach(), moved.target

        self.random_states = []
        others = batch.ahead.batches if batch.ahead is not None else ()
        with preserved_statistics(engine.model):
            # By map, since a variable of a loop would hold each batch while the next one is made.
            outputs, targets = zip(*map(output_and_target, chain([batch], others)), strict=True)
        self.differentiate(engine, outputs, targets)

    def differentiate(self, engine: Contrasting, outputs: tuple[Tensor, ...], targets: tuple[Tensor, ...]) -> None:
        """Set the losses of this rank's samples, and the gradients by their outputs of the mean loss over all ranks, times their number."""
        own, target = torch.cat(outputs), torch.cat(targets)
        world, rank, count = engine.trainer.world_size, engine.trainer.global_rank, len(own)
        everyone = gathered(own, world).requires_grad_()
        target_of_everyone = gathered(target, world)
        losses = []
        index = torch.arange(count, device=own.device) + rank * count
        with torch.enable_grad():
            for rows in index.split(max(1, CHUNK_VALUES // len(everyone))):
                loss = engine.task.contrast(Pool(everyone, target_of_everyone, rows))
                (loss.sum() / count).backward()
                losses.append(loss.detach())
        assert everyone.grad is not None
        gradient = summed(everyone.grad, world)[rank * count : (rank + 1) * count]
        sizes = [len(output) for output in outputs]
        self.gradients, self.losses = gradient.split(sizes), torch.cat(losses).split(sizes)


@contextmanager
def preserved_statistics(model: nn.Module) -> Iterator[None]:
    """Context after which the running statistics of batch normalisation are what they were before."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    buffers = [buffer for layer in layers for buffer in layer.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, earlier in zip(buffers, before, strict=True):
            buffer.copy_(earlier)


def random_state(device: torch.device) -> list[Tensor]:
    """The state of torch's generators of the CPU and this device."""
    own = [] if device.type == "cpu" else [getattr(torch, device.type).get_rng_state()]
    return [torch.get_rng_state(), *own]


def set_random_state(device: torch.device, state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if device.type != "cpu":
        getattr(torch, device.type).set_rng_state(state[1])
