"""Averages of the weights over training, evaluated and saved in their place."""

from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from fusion.errors import UserError
from fusion.lightning_private import AveragedWeights


class Average(AveragedWeights):
    """Lightning's, on the device of the model, whenever that has moved there; how many updates were averaged is counted on the host, which
    torch's own way asks the device for.

    combine: averages, weights of now and how many were averaged before -> the averages, in place.
    """

    def __init__(self, combine: Callable[[Any, Any, Any], None]) -> None:
        super().__init__(use_buffers=True)
        self.combine = combine

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.averaged is not None
        self.averaged.module.to(pl_module.device)
        self.averaged.n_averaged = self.averaged.n_averaged.cpu()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step > self.latest_update and self.should_update(step_idx=trainer.global_step - 1):
            self.average(pl_module)
            self.latest_update = trainer.global_step

    @torch.no_grad()
    def average(self, module: LightningModule) -> None:
        """Take in the weights and buffers of now; of whole numbers (counts of batches) the last."""
        averaged = self.averaged
        assert averaged is not None
        count = int(averaged.n_averaged)
        before, after = (chain(m.parameters(), m.buffers()) for m in (averaged.module, module))
        alike: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for average, now in zip(before, after, strict=True):
            if count and average.is_floating_point():
                alike[average.dtype][0].append(average.detach())
                alike[average.dtype][1].append(now.detach())
            else:
                average.detach().copy_(now.detach())
        for averages, weights in alike.values():
            self.combine(averages, weights, count)
        averaged.n_averaged += 1


class EMA(Average):
    """Exponential moving average of the weights, over updates really made; it is what is validated, saved and tested.

        a <- decay * a + (1 - decay) * w, from a = w after the first update

    Buffers (statistics of batch normalisation) are averaged too.

    Args:
        decay: how much of the average an update leaves, from 0 to below 1; it spans about 1 / (1 - decay) updates.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"EMA: decay is {decay}; expected a share, from 0 to below 1")
        super().__init__(get_ema_multi_avg_fn(decay))


class SWA(Average):
    """Stochastic weight averaging: the mean of the weights at the ends of the last epochs.

    What is validated, saved and tested is the average; before it begins, the weights themselves. Buffers (statistics of batch
    normalisation) are averaged too. The learning rate stays the schedule's: give it a floor (engine/swa does).

    Source: Izmailov et al. (2018), "Averaging Weights Leads to Wider Optima and Better Generalization". Lightning's own
    StochasticWeightAveraging takes over the schedule, counts epochs only, and leaves checkpoints without the average.

    Args:
        start: the share of the epochs after which averaging begins, from 0 to below 1.
    """

    def __init__(self, start: float = 0.75) -> None:
        if not 0 <= start < 1:
            raise UserError(f"SWA: start is {start}; expected a share of the epochs, from 0 to below 1")
        super().__init__(get_swa_multi_avg_fn())
        self.start = start

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.trainer = trainer

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        if step_idx is None or self.averaged is None:
            return False
        first = int(self.start * (self.trainer.max_epochs or 0))
        if self.trainer.current_epoch <= first:
            self.averaged.n_averaged.zero_()  # the next one replaces what is there
        return self.trainer.current_epoch < first or self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
