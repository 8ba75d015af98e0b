"""What happens around each step: randomness that can be continued, checkpoints in time, and signals that lose nothing."""

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
from fusion.lightning_private import hear_no_signals, is_accumulating, is_by_clock, timeout_of, validation_is_due
from fusion.training.callbacks.checkpoints import BestAndLast
from fusion.training.engine import Engine


class SeedEachStep(Callback):
    """Dropout's randomness as a function of seed, batch and rank: a resumed run draws what the uninterrupted one would have drawn."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(draw_seed(self.seed, trainer.current_epoch, batch_idx, trainer.global_rank))


class Interrupted(Exception):
    """Training stopped by a signal, after saving; `status` is what the process should end with."""

    def __init__(self, status: int) -> None:
        super().__init__(f"stopped by a signal, status {status}")
        self.status = status


class SaveInTime(Checkpoint):
    """Saves within epochs: when the checkpoint's schedule says so, and when a signal asks the run to end.

    Ctrl-C (SIGINT), SIGTERM and SIGUSR1 (what SLURM sends before a job's time is up) end the run after the update at hand (the next, for
    one of several ranks that had already agreed on it) or the batch of validation, with a checkpoint; a second Ctrl-C ends it at once.
    A validation that was cut short is made anew when the run goes on, one that follows an update at which a checkpoint is due comes after
    it.

    All ranks agree on each of these, over a channel between CPUs: saving is a collective, and a signal may reach one rank alone. Of an
    update they agree before it is made (AgreeFirst). (A Checkpoint, since Lightning calls those last: what it saves has what the other
    callbacks did after the update, such as averages of the weights.)
    """

    def __init__(self) -> None:
        self.asked = 0  # of this rank
        self.agreed = 0  # of any
        self.interrupted = False
        self.due = False
        self.cut_short = False
        self.validation_to_come = False
        self.epoch_saved = False
        self.before: dict[signal.Signals, Any] = {}
        self.group: Any = None
        self.checkpoint: BestAndLast | None = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.checkpoint = next((c for c in trainer.callbacks if isinstance(c, BestAndLast)), None)  # type: ignore[attr-defined]
        if trainer.world_size > 1 and dist.get_backend() != "gloo":
            self.group = dist.new_group(backend="gloo", timeout=timeout_of(trainer.strategy))
        hear_no_signals(trainer)  # of which it is told here
        self.before = {number: signal.signal(number, self.ask) for number in SIGNALS}

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.give_back()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, Interrupted):  # else this rank's own signal may be still to come; Lightning's teardown gives back
            self.give_back()

    def give_back(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.interrupted:  # not self.asked, which may come from another rank whose signal was faster
                raise KeyboardInterrupt
            self.interrupted = True
        self.asked = max(self.asked, SIGNALS[signal.Signals(number)])

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(module, Engine)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:  # a checkpoint holds no half-accumulated gradients
            return
        if trainer.world_size == 1:
            self.agreed = self.asked
        self.due = self.due or (self.checkpoint is not None and self.checkpoint.due_by_count(module.updates))
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch or validation_follows(trainer) or over(trainer):
            return  # Lightning would leave out a validation that follows a checkpoint made here
        if self.due or self.agreed:
            self.save(trainer)
        self.leave_if_asked()

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.due and may_be_made_anew(trainer):
            self.save(trainer, validation_to_come=True)

    def on_validation_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if not may_be_made_anew(trainer):
            return
        self.agree(trainer)
        if self.agreed and not trainer.fit_loop.epoch_loop.val_loop.batch_progress.is_last_batch:
            self.cut_short = True
            raise StopIteration  # which ends the loop, so that what is undone after validation is: averaged weights go back

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.cut_short:  # before the scores are made, which would be of a part
            self.save(trainer, validation_to_come=True)
            self.leave_if_asked()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.epoch_saved = True

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.agree(trainer)
        if self.epoch_saved:
            self.leave_if_asked()

    def agree(self, trainer: Trainer, *, due: bool = False) -> None:
        """On the strongest wish of any rank. Raises RuntimeError where one is lost."""
        self.agreed, self.due = self.asked, due
        if trainer.world_size > 1:
            wishes = torch.tensor([self.asked, due])
            dist.all_reduce(wishes, op=dist.ReduceOp.MAX, group=self.group)
            self.agreed, self.due = int(wishes[0]), bool(wishes[1])

    def save(self, trainer: Trainer, *, validation_to_come: bool = False) -> None:
        self.validation_to_come, self.due = validation_to_come, False
        if self.checkpoint is not None:
            self.checkpoint.save_now(trainer)
        self.validation_to_come = False

    def leave_if_asked(self) -> None:
        if self.agreed:
            raise Interrupted(self.agreed)

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.validation_to_come:
            # What Lightning takes for a run that stopped in its first batch of validation, to which it goes back.
            begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            progress = {"total": begun, "current": dict.fromkeys(begun, 0), "is_last_batch": False}
            checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"] = progress


class AgreeFirst(Callback):
    """Has the ranks agree on an update before anything waits for the device: a GPU that sums gradients with a rank that is gone would never
    be done, and the host would hear of it by NCCL's watchdog alone, which ends the process without a word. (Two waits come earlier and end
    that way all the same: of a rank that dies after it agreed, and of synchronised batch normalisation, in the forward pass.)
    """

    def __init__(self, save: SaveInTime) -> None:
        self.save = save

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        checkpoint = self.save.checkpoint
        self.save.agree(trainer, due=checkpoint is not None and checkpoint.due_by_clock())


def over(trainer: Trainer) -> bool:
    """Whether max_steps are done. Such a run is let finish: Lightning would not go back into the epoch of a checkpoint made of it."""
    return 0 < trainer.max_steps <= trainer.global_step


def validation_follows(trainer: Trainer) -> bool:
    """Whether the batch at hand is followed by validation; by a clock (val_check_interval as a time), on which ranks need not agree, no."""
    return not is_by_clock(trainer) and not trainer.fit_loop.epoch_loop.val_loop.skip and validation_is_due(trainer)


def may_be_made_anew(trainer: Trainer) -> bool:
    """Whether a run could go on from the start of the validation at hand: not within an update's accumulated batches."""
    if trainer.state.fn != "fit" or trainer.sanity_checking or is_by_clock(trainer):
        return False
    return not over(trainer) and not is_accumulating(trainer)
