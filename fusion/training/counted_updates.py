"""The optimiser and schedule of the engine, which count the updates that were made."""

from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from typing import Any

from lightning.pytorch import LightningModule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fusion.errors import UserError, construction
from fusion.lightning_private import logs_now
from fusion.model import FusionModel, factory_parts
from fusion.training.distributed.ddp import DDP
from fusion.training.distributed.fsdp import FSDP
from fusion.training.means import Means
from fusion.training.optim.freezing import Freezing
from fusion.training.optim.groups import Rate, parameter_groups
from fusion.training.optim.precision import scaler_of
from fusion.training.optim.schedules import Schedule
from fusion.training.zeros import KeptZeros


class CountedUpdates(LightningModule):
    """A module whose schedule and counters advance with each update that the optimiser made, not with those that a gradient scaler skipped.

    updates, skipped: numbers of updates made and skipped so far. horizon: planned number. peak: the optimiser's learning rate.
    """

    model: FusionModel | None
    make_optimizer: Callable[..., Optimizer]
    schedule: Schedule
    rates: Mapping[str, Rate]
    freezing: Freezing
    means: Means
    zeros: KeptZeros | None

    def __init__(self) -> None:
        super().__init__()
        self.updates = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.scheduled = 0

    def configure_optimizers(self) -> Any:
        optimizer = self.new_optimizer()
        # GradScaler doesn't step the optimiser when it skips an update, so that counting steps counts the updates made.
        optimizer.register_step_post_hook(self.count_update)
        if self.zeros is not None:
            optimizer.register_step_post_hook(self.zeros.apply)
        horizon = self.trainer.estimated_stepping_batches
        if horizon == float("inf"):
            raise UserError("the schedule needs an end: set --trainer.max_epochs or --trainer.max_steps")
        self.horizon = int(horizon)
        scheduler = LambdaLR(optimizer, [partial(self.factor, own) for own in self.own_schedules])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def factor(self, own: Schedule | None, update: int) -> float:
        """Learning rate of a parameter group as a fraction of its peak, by the run's schedule and the group's own."""
        return self.schedule.factor(update, self.horizon) * (own.factor(update, self.horizon) if own else 1.0)

    def new_optimizer(self) -> Optimizer:
        """The optimiser of the recipe, with its parameter groups; the module must be attached to a trainer."""
        assert self.model is not None
        groups = [*parameter_groups(self.model, self.rates, self.freezing.later(self.model)), *self.further_groups()]
        self.own_schedules: list[Schedule | None] = [group.pop("schedule", None) for group in groups]
        with construction():
            optimizer = self.make_optimizer(groups, **self.fused())
        # Otherwise a fused kernel would unscale the gradients itself, after they were clipped, balanced and checked.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        self.peak: float = optimizer.defaults["lr"]
        for group in optimizer.param_groups:
            group["lr"] *= group["rate"]
        return optimizer

    def further_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters that are trained with the model, but are no part of it."""
        return []

    def fused(self) -> dict[str, bool]:
        """fused=True where the optimiser has this option and the recipe doesn't set it: one kernel for all parameters, several times faster
        for many small ones. Not for sharded parameters (FSDP), for which not all optimisers have such a kernel.
        """
        cls, options = factory_parts(self.make_optimizer, Optimizer)
        has_option = "fused" in signature(cls).parameters and options.get("fused") is None
        return {"fused": True} if has_option and not isinstance(self.trainer.strategy, FSDP) else {}

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None) -> None:
        before = self.updates
        rate = self.peak * self.schedule.factor(self.updates, self.horizon)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.skipped_in_a_row = 0 if self.updates > before else self.skipped_in_a_row + 1
        if self.updates == before:
            self.skipped += 1
            # Lightning is about to count this step, which would advance global_step towards max_steps.
            steps = self.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
            for progress in (steps.total, steps.current):
                progress.ready -= 1
                progress.completed -= 1
        if logs_now(self.trainer):  # logging costs a millisecond, and reading the scale synchronises with the device
            means = {f"train/{name}_step": mean for name, mean in self.means.of_update(self).items()}
            self.log_dict({"train/lr": rate, **self.figures(), **means})

    def figures(self) -> dict[str, float]:
        """Further figures that are logged with an update."""
        scaler, strategy = scaler_of(self.trainer.precision_plugin), self.trainer.strategy
        of_scaler = {} if scaler is None else {"train/loss_scale": scaler.get_scale(), "train/skipped_updates": float(self.skipped)}
        return of_scaler | ({"train/sent_bytes": float(strategy.sent_bytes())} if isinstance(strategy, DDP) else {})

    def count_update(self, optimizer: Optimizer, *_: Any) -> None:
        self.updates += 1

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if self.updates > self.scheduled:
            scheduler.step()
            self.scheduled = self.updates
