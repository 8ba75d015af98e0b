"""Resumable randomness, checkpoints within epochs, and signals that end a run with a checkpoint."""

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch.optim import Optimizer

from fusion.data.sampler import draw_seed
from fusion.exit import SIGNALS
from fusion.lightning_private import disable_sigterm_broadcast, is_accumulating, is_by_clock, timeout_of, validation_is_due
from fusion.training.callbacks.checkpoints import BestAndLast
from fusion.training.engine import Engine


class SeedEachStep(Callback):
    """Seeds torch from the run's seed, epoch, batch and rank, so that a resumed run draws the same dropout as an uninterrupted one."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        seed = draw_seed(self.seed, trainer.current_epoch, batch_idx, trainer.global_rank)
        # Not torch.manual_seed, which formats the stack for every kind of device that is not in use: 2 % of a small model's update.
        torch.default_generator.manual_seed(seed)
        if module.device.type != "cpu":
            getattr(torch, module.device.type).manual_seed(seed)


class Interrupted(Exception):
    """Training stopped by a signal, after saving; `status` is the process's exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"stopped by a signal, status {status}")
        self.status = status


class SaveInTime(Checkpoint):
    """Saves checkpoints within epochs: when one is due by updates or time, and when a signal requests the run to end.

    Ctrl-C (SIGINT), SIGTERM and SIGUSR1 (sent by SLURM before a job's time limit) end the run with a checkpoint, after the current update
    (after the next one, if the ranks had already agreed on the current one) or validation batch; a second Ctrl-C ends it immediately. A
    validation that was interrupted is repeated when the run is resumed. Where a checkpoint is due at an update that validation follows, it
    is saved before the validation.

    All ranks agree on each of these, by a collective on CPUs (gloo): saving is a collective, and a signal may reach only one rank. On an
    update they agree before it is made (AgreeFirst). (It is a Checkpoint, since Lightning calls those last: its checkpoints then include
    what other callbacks do after the update, such as weight averaging.)

    requested: exit status requested by signals to this rank, 0 if none. agreed: the highest one of all ranks.
    """

    def __init__(self) -> None:
        self.requested = 0
        self.agreed = 0
        self.interrupted = False
        self.due = False
        self.validation_interrupted = False
        self.validation_pending = False
        self.epoch_saved = False
        self.earlier_handlers: dict[signal.Signals, Any] = {}
        self.group: Any = None
        self.checkpoint: BestAndLast | None = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.checkpoint = next((c for c in trainer.callbacks if isinstance(c, BestAndLast)), None)  # type: ignore[attr-defined]
        if trainer.world_size > 1 and dist.get_backend() != "gloo":
            self.group = dist.new_group(backend="gloo", timeout=timeout_of(trainer.strategy))
        disable_sigterm_broadcast(trainer)  # this callback handles signals itself
        self.earlier_handlers = {number: signal.signal(number, self.on_signal) for number in SIGNALS}

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.restore_handlers()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, Interrupted):  # else a signal to this rank may still arrive; Lightning's teardown restores handlers
            self.restore_handlers()

    def restore_handlers(self) -> None:
        for number, handler in self.earlier_handlers.items():
            signal.signal(number, handler)
        self.earlier_handlers = {}

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.interrupted:  # not self.requested, which another kind of signal sets too
                raise KeyboardInterrupt
            self.interrupted = True
        self.requested = max(self.requested, SIGNALS[signal.Signals(number)])

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(module, Engine)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:  # checkpoints don't include partially accumulated gradients
            return
        if trainer.world_size == 1:
            self.agreed = self.requested
        self.due = self.due or (self.checkpoint is not None and self.checkpoint.due_by_count(module.updates))
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch or validation_follows(trainer) or max_steps_reached(trainer):
            return  # resumed from a checkpoint saved here, Lightning would skip the validation that follows
        if self.due or self.agreed:
            self.save(trainer)
        self.stop_if_agreed()

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.due and can_repeat_validation(trainer):
            self.save(trainer, validation_pending=True)

    def on_validation_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if not can_repeat_validation(trainer):
            return
        self.agree(trainer)
        if self.agreed and not trainer.fit_loop.epoch_loop.val_loop.batch_progress.is_last_batch:
            self.validation_interrupted = True
            raise StopIteration  # ends the loop normally, so that what callbacks do after validation is done (restoring averaged weights)

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.validation_interrupted:  # before the scores are computed, which would be of a part of the split
            self.save(trainer, validation_pending=True)
            self.stop_if_agreed()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.epoch_saved = True

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.agree(trainer)
        if self.epoch_saved:
            self.stop_if_agreed()

    def agree(self, trainer: Trainer, *, due: bool = False) -> None:
        """Set `agreed` and `due` to the maximum over all ranks. Raises RuntimeError where a rank is lost."""
        self.agreed, self.due = self.requested, due
        if trainer.world_size > 1:
            maxima = torch.tensor([self.requested, due])
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=self.group)
            self.agreed, self.due = int(maxima[0]), bool(maxima[1])

    def save(self, trainer: Trainer, *, validation_pending: bool = False) -> None:
        self.validation_pending, self.due = validation_pending, False
        if self.checkpoint is not None:
            self.checkpoint.save_now(trainer)
        self.validation_pending = False

    def stop_if_agreed(self) -> None:
        if self.agreed:
            raise Interrupted(self.agreed)

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.validation_pending:
            # The progress of a run that stopped in its first validation batch, from which Lightning resumes with the whole validation.
            started = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            progress = {"total": started, "current": dict.fromkeys(started, 0), "is_last_batch": False}
            checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"] = progress


class AgreeFirst(Callback):
    """Makes the ranks agree on an update before the host synchronises with the device. A GPU would wait forever for the gradients of a lost
    rank, until NCCL's watchdog ends the process without a message. (Two cases still end that way: a rank that dies after it agreed, and
    synchronised batch normalisation, which waits in the forward pass.)
    """

    def __init__(self, save: SaveInTime) -> None:
        self.save = save

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        checkpoint = self.save.checkpoint
        self.save.agree(trainer, due=checkpoint is not None and checkpoint.due_by_clock())


def max_steps_reached(trainer: Trainer) -> bool:
    """Whether max_steps are done. Such a run isn't stopped: Lightning would not resume within the epoch of its checkpoint."""
    return 0 < trainer.max_steps <= trainer.global_step


def validation_follows(trainer: Trainer) -> bool:
    """Whether validation follows the current batch; False for validation by time, on which the ranks' clocks may differ."""
    return not is_by_clock(trainer) and not trainer.fit_loop.epoch_loop.val_loop.skip and validation_is_due(trainer)


def can_repeat_validation(trainer: Trainer) -> bool:
    """Whether a run can be resumed from the start of the current validation: not within an update's accumulated batches."""
    if trainer.state.fn != "fit" or trainer.sanity_checking or is_by_clock(trainer):
        return False
    return not max_steps_reached(trainer) and not is_accumulating(trainer)
