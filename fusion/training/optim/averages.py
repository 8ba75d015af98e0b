"""Weight averaging (EMA, SWA): the averaged weights are evaluated and saved in place of the trained ones."""

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
    """Lightning's WeightAveraging, with the averages on the model's device and the number of averaged updates counted on the host (torch
    reads it from the device, which synchronises).

    combine: updates the averages in place, from (averages, current weights, number of updates averaged before).
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
        """Add the current weights and buffers to the averages; integers (counts of batches) are copied instead."""
        averaged = self.averaged
        assert averaged is not None
        count = int(averaged.n_averaged)
        averages, currents = (chain(m.parameters(), m.buffers()) for m in (averaged.module, module))
        by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for average, current in zip(averages, currents, strict=True):
            if count and average.is_floating_point():
                by_dtype[average.dtype][0].append(average.detach())
                by_dtype[average.dtype][1].append(current.detach())
            else:
                average.detach().copy_(current.detach())
        for same_dtype, weights in by_dtype.values():
            self.combine(same_dtype, weights, count)
        averaged.n_averaged += 1


class EMA(Average):
    """Exponential moving average of the weights over the updates made (not the skipped ones); it is validated, saved and tested.

        a <- decay * a + (1 - decay) * w, from a = w after the first update

    Buffers (batch normalisation statistics) are averaged too.

    Args:
        decay: weight of the previous average at each update, from 0 to below 1; the average spans about 1 / (1 - decay) updates.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"EMA: decay is {decay}; expected a fraction, from 0 to below 1")
        super().__init__(get_ema_multi_avg_fn(decay))


class SWA(Average):
    """Stochastic weight averaging: the mean of the weights at the ends of the last epochs.

    The average is validated, saved and tested; before averaging begins, the weights themselves are. Buffers (batch normalisation
    statistics) are averaged too. The learning rate still follows the schedule: give it a floor (as engine/swa does).

    Source: Izmailov et al. (2018), "Averaging Weights Leads to Wider Optima and Better Generalization". Lightning's own
    StochasticWeightAveraging replaces the schedule, counts only epochs, and doesn't save the average in checkpoints.

    Args:
        start: fraction of the epochs after which averaging begins, from 0 to below 1.
    """

    def __init__(self, start: float = 0.75) -> None:
        if not 0 <= start < 1:
            raise UserError(f"SWA: start is {start}; expected a fraction of the epochs, from 0 to below 1")
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
            self.averaged.n_averaged.zero_()  # the next update restarts the average
        return self.trainer.current_epoch < first or self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
