"""All private names of Lightning that the project uses: to be checked when another version of Lightning is allowed."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

# Training loop


def training_batches(trainer: Trainer) -> Any:
    """The batch sampler of the training loader; None before the loaders are set up."""
    loader = trainer.fit_loop._combined_loader
    return None if loader is None else loader.flattened[0].batch_sampler


def batches_that_stepped(trainer: Trainer) -> int:
    """The step number that loggers use."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def is_by_clock(trainer: Trainer) -> bool:
    """Whether validation runs at time intervals (val_check_interval as a time), on which the ranks' clocks may differ."""
    return trainer._val_check_time_interval is not None  # type: ignore[attr-defined]


def validation_is_due(trainer: Trainer) -> bool:
    """Whether validation follows the current batch."""
    return trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]


def is_accumulating(trainer: Trainer) -> bool:
    """Whether the current batch doesn't complete its update (gradient accumulation)."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def disable_sigterm_broadcast(trainer: Trainer) -> None:
    """Disable Lightning's broadcast of SIGTERM before every batch: it synchronises with the device, only handles signals to the first
    rank, and hides a lost rank."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


# Logging


def logs_now(trainer: Trainer) -> bool:
    """Whether the metrics of the current batch are passed to the loggers."""
    return trainer._logger_connector.should_update_logs


def log_now(trainer: Trainer, metrics: dict[str, Any]) -> None:
    trainer._logger_connector.log_metrics(metrics)


def step_metrics(trainer: Trainer) -> dict[str, float]:
    """The metrics logged at the current batch."""
    return {name: float(value) for name, value in trainer.fit_loop.epoch_loop._results.metrics(on_step=True)["log"].items()}


# Callbacks


def save_last(callback: ModelCheckpoint, trainer: Trainer) -> None:
    """Write last.ckpt at the end of an epoch, whether or not there is a new best one."""
    if not callback._should_skip_saving_checkpoint(trainer):
        callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))


def checks_at_epoch_end(callback: Callback) -> bool | None:
    """Whether early stopping checks its metric at the end of training epochs; None where Lightning decides. False for other callbacks."""
    return getattr(callback, "_check_on_train_epoch_end", False)


def check_after_validation(callback: EarlyStopping) -> None:
    callback._check_on_train_epoch_end = False


class AveragedWeights(WeightAveraging):
    """Lightning's WeightAveraging, with public names for its state."""

    @property
    def averaged(self) -> Any:
        """The averaged model (torch.optim.swa_utils.AveragedModel), None before the run is set up."""
        return self._average_model

    @property
    def latest_update(self) -> int:
        """The last update whose weights were averaged."""
        return self._latest_update_step

    @latest_update.setter
    def latest_update(self, update: int) -> None:
        self._latest_update_step = update


# Strategies


def timeout_of(strategy: Strategy) -> Any:
    """How long the strategy's ranks wait for each other, None where it isn't set."""
    return getattr(strategy, "_timeout", None)


def syncs_batchnorm(strategy: Strategy) -> bool:
    """Whether trainer.sync_batchnorm is set."""
    return bool(getattr(strategy, "_layer_sync", None))


class HookedDDP(DDPStrategy):
    """Lightning's DDP, with hooks that it has no public names for."""

    def _configure_launcher(self) -> None:
        self.before_launch()
        super()._configure_launcher()

    def before_launch(self) -> None:
        """Called before the other processes are started."""

    @property
    def backend(self) -> str:
        """Backend of the process group: "nccl" or "gloo"."""
        return self._get_process_group_backend()

    def sync_batchnorm_by(self, plugin: Any) -> None:
        self._layer_sync = plugin

    def _register_ddp_hooks(self) -> None:
        self.register_hooks()

    def register_hooks(self) -> None:
        """Called once the model is wrapped and on its device."""


class WholeMesh(ModelParallelStrategy):
    """Lightning's FSDP2 over the processes of all nodes, instead of those of one node."""

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


# Command line


class LateCLI(LightningCLI):
    """LightningCLI that only parses: it neither seeds nor instantiates classes."""

    def _set_seed(self) -> None:
        pass
