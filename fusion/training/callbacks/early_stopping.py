"""Early stopping by the score that chooses the best checkpoint."""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from fusion.errors import UserError
from fusion.training.engine import Engine


class StopEarly(EarlyStopping):
    """Ends the training when the monitored validation score (the task's own, or --monitor's) has not improved for some validations.

    It only saves time: the best checkpoint is tested with or without it.

    Args:
        patience: validations without an improvement, at least 1.
        min_delta: smallest change that is an improvement.
    """

    def __init__(self, patience: int = 4, min_delta: float = 0.0) -> None:
        if patience < 1 or min_delta < 0:
            raise UserError(f"StopEarly: patience is {patience}, min_delta {min_delta}; expected at least 1, and at least 0")
        super().__init__(monitor="val/loss", patience=patience, min_delta=min_delta)

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        assert isinstance(module, Engine)
        if stage == "fit":
            self.monitor, self.mode = f"val/{module.task.monitor}", module.task.mode
            self.min_delta = abs(self.min_delta) * (1 if self.mode == "max" else -1)
            self.best_score = torch.tensor(torch.inf if self.mode == "min" else -torch.inf)
        super().setup(trainer, module, stage)
