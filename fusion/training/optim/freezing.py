"""Freezing: which parameters are not trained, and until which update."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from fusion.encoders import Encoder
from fusion.errors import UserError
from fusion.model import FusionModel, check_part, part_of, plain_name


@dataclass
class Freeze:
    """Freezes a part of the model, or the parameters that match a pattern.

    Args:
        until_update: number of updates after which it is unfrozen, at least 1. None: never.
    """

    until_update: int | None = None


class Freezing:
    """Freezes parameters as a function of the number of updates made, so that a resumed run unfreezes at the same update.

    freeze: by part (image, text, head) or by a pattern of parameter names as `plain_name` gives them ("text.*embeddings*"). A frozen part
    is in eval mode, and a frozen encoder stores no activations; the statistics of a frozen batch normalisation don't change.
    """

    def __init__(self, freeze: Mapping[str, Freeze], modalities: list[str]) -> None:
        for key, what in freeze.items():
            if not any(letter in key for letter in ".*?["):
                check_part("model.freeze", key, modalities, " A pattern of parameter names has a . or *")
            if what.until_update is not None and what.until_update < 1:
                raise UserError(f"model.freeze.{key}: until_update is {what.until_update}; expected at least 1, or null for never")
        self.freeze = dict(freeze)
        self.frozen_names: frozenset[str] | None = None
        self.last_active: list[str] | None = None
        self.eval_modules: list[nn.Module] = []  # kept in eval mode

    def check(self, model: FusionModel) -> None:
        """Raises UserError for a pattern that matches nothing, and where no parameter would be trained."""
        names = [name for name, _ in model.named_parameters()]
        for key in self.freeze:
            if not any(matches(key, name) for name in names):
                tops = sorted({".".join(plain_name(name).split(".")[:3]) for name in names})
                raise UserError(f"model.freeze: no parameter matches '{key}'; there are {', '.join(f'{top}*' for top in tops[:8])}")
        frozen = self.frozen(model, 0)
        if not any(p.requires_grad and name not in frozen for name, p in model.named_parameters()):
            raise UserError("model.freeze: no trainable parameter is left at the first update")

    def active(self, updates: int | None) -> list[str]:
        """The keys that apply after so many updates; with None, those that always apply."""
        return [key for key, f in self.freeze.items() if f.until_update is None or (updates is not None and updates < f.until_update)]

    def frozen(self, model: FusionModel, updates: int | None) -> frozenset[str]:
        """Names of the parameters frozen after so many updates; with None, of those that are always frozen."""
        active = self.active(updates)
        return frozenset(name for name, _ in model.named_parameters() if any(matches(key, name) for key in active))

    def later(self, model: FusionModel) -> dict[str, int]:
        """Number of updates after which a parameter is unfrozen, by name, of those frozen at first but not always."""
        unfrozen = self.frozen(model, 0) - self.frozen(model, None)
        untils = {key: f.until_update for key, f in self.freeze.items() if f.until_update is not None}
        return {name: max(until for key, until in untils.items() if matches(key, name)) for name in unfrozen}

    def apply(self, model: FusionModel, updates: int) -> bool:
        """Freeze and unfreeze for so many updates; returns whether any parameter was unfrozen."""
        if not self.freeze:
            return False
        before, active = self.frozen_names, self.active(updates)
        if active != self.last_active:
            self.last_active = active
            self.frozen_names = self.frozen(model, updates)
            self.set_frozen(model, before or frozenset(), self.frozen_names)
        for module in self.eval_modules:  # an evaluation during training sets all modules to training mode afterwards
            module.eval()
        return before is not None and self.frozen_names is not None and bool(before - self.frozen_names)

    def reapply(self, model: FusionModel) -> None:
        """Freeze again, after modules of the model were replaced by others with the same parameters."""
        if self.frozen_names is not None:
            self.set_frozen(model, self.frozen_names, self.frozen_names)

    def set_frozen(self, model: FusionModel, before: frozenset[str], now: frozenset[str]) -> None:
        for name, p in model.named_parameters():
            if name in before | now:
                p.requires_grad_(name not in now)
        whole = {part for part in model.parts() if {name for name, _ in model.named_parameters() if part_of(name) == part} <= now}
        for part, module in model.parts().items():
            if isinstance(module, Encoder) and part in self.freeze:
                module.frozen = part in whole
                module.train(model.training)
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.weight is not None]
        self.eval_modules = [m for m in norms if not m.weight.requires_grad] + ([model.head] if "head" in whole else [])


def matches(key: str, name: str) -> bool:
    """Whether a key of `freeze` is the part that a parameter belongs to, or a pattern that matches its plain name."""
    return part_of(name) == key or fnmatchcase(plain_name(name), key)


def rewrap_ddp(trainer: Trainer) -> None:
    """Wrap the model in DDP again: it only reduces gradients of parameters that were trainable when it wrapped the model."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        strategy.model = strategy.lightning_module
        strategy.configure_ddp()
