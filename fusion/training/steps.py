"""What happens around each step: randomness that can be continued, checkpoints in time, and signals that lose nothing."""

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from fusion.data.sampler import draw_seed
from fusion.errors import INTERRUPTED, REQUEUE
from fusion.training.checkpoints import BestAndLast
from fusion.training.task import Task

SIGNALS = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: REQUEUE, signal.SIGUSR1: REQUEUE}


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

    Ctrl-C (SIGINT), SIGTERM and SIGUSR1 (what SLURM sends before a job's time is up) end the run after the update or the batch of
    validation at hand, with a checkpoint; a second Ctrl-C ends it at once. A validation that was cut short is made anew when the run goes
    on, one that follows an update at which a checkpoint is due comes after it.

    All ranks agree after each of these, over a channel between CPUs that waits for no GPU: saving is a collective, and a signal may reach
    one rank alone. (A Checkpoint, since Lightning calls those last: what it saves has what the other callbacks did after the update, such
    as averages of the weights.)
    """

    def __init__(self) -> None:
        self.asked = 0
        self.due = False
        self.cut_short = False
        self.validation_to_come = False
        self.before: dict[signal.Signals, Any] = {}
        self.group: Any = None
        self.checkpoint: BestAndLast | None = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.checkpoint = next((c for c in trainer.callbacks if isinstance(c, BestAndLast)), None)  # type: ignore[attr-defined]
        if trainer.world_size > 1 and dist.get_backend() != "gloo":
            self.group = dist.new_group(backend="gloo")
        self.before = {number: signal.signal(number, self.ask) for number in SIGNALS}

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.give_back()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self.give_back()

    def give_back(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked:
            raise KeyboardInterrupt
        self.asked = max(self.asked, SIGNALS[signal.Signals(number)])

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(module, Task)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:  # a checkpoint holds no half-accumulated gradients
            return
        self.agree(trainer, due=self.checkpoint is not None and self.checkpoint.due(module.updates))
        loop = trainer.fit_loop.epoch_loop
        if loop.batch_progress.is_last_batch or loop._should_check_val_fx(trainer.fit_loop._data_fetcher):  # type: ignore[arg-type]
            return  # Lightning would leave out a validation that follows a checkpoint made here
        if self.due or self.asked:
            self.save(trainer)
        self.leave_if_asked()

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self.due:
            self.save(trainer, validation_to_come=True)

    def on_validation_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self.agree(trainer)
        if self.asked and not trainer.fit_loop.epoch_loop.val_loop.batch_progress.is_last_batch:
            self.cut_short = True
            raise StopIteration  # which ends the loop, so that what is undone after validation is: averaged weights go back

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.cut_short:  # before the scores are made, which would be of a part
            self.save(trainer, validation_to_come=True)
            self.leave_if_asked()

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.agree(trainer)
        self.leave_if_asked()  # the epoch's checkpoint is there

    def agree(self, trainer: Trainer, *, due: bool = False) -> None:
        """On the strongest wish of any rank."""
        self.due = due
        if trainer.world_size > 1:
            wishes = torch.tensor([self.asked, due])
            dist.all_reduce(wishes, op=dist.ReduceOp.MAX, group=self.group)
            self.asked, self.due = int(wishes[0]), bool(wishes[1])

    def save(self, trainer: Trainer, *, validation_to_come: bool = False) -> None:
        self.validation_to_come, self.due = validation_to_come, False
        if self.checkpoint is not None:
            self.checkpoint.save_now(trainer)
        self.validation_to_come = False

    def leave_if_asked(self) -> None:
        if self.asked:
            raise Interrupted(self.asked)

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.validation_to_come:
            # What Lightning takes for a run that stopped in its first batch of validation, to which it goes back.
            begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            progress = {"total": begun, "current": dict.fromkeys(begun, 0), "is_last_batch": False}
            checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"] = progress
