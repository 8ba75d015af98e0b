"""What doesn't learn, and until when."""

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
    """Hold a part of the model, or the parameters that a pattern matches.

    Args:
        until_update: the number of updates after which it learns, at least 1. None: never.
    """

    until_update: int | None = None


class Freezing:
    """Which parameters learn is a function of the number of updates made, so that a resumed run thaws when the whole one would.

    freeze: by part (image, text, head) or by a pattern of parameter names as `plain_name` gives them ("text.*embeddings*"). A frozen part
    is in eval mode, and a frozen encoder keeps no activations; a frozen batch normalisation holds its statistics.
    """

    def __init__(self, freeze: Mapping[str, Freeze], modalities: list[str]) -> None:
        for key, what in freeze.items():
            if not any(letter in key for letter in ".*?["):
                check_part("model.freeze", key, modalities, " A pattern of parameter names has a . or *")
            if what.until_update is not None and what.until_update < 1:
                raise UserError(f"model.freeze.{key}: until_update is {what.until_update}; expected at least 1, or null for never")
        self.freeze = dict(freeze)
        self.held: frozenset[str] | None = None
        self.was_active: list[str] | None = None
        self.still: list[nn.Module] = []  # what is in eval mode

    def check(self, model: FusionModel) -> None:
        """Raises UserError for a pattern that matches nothing, and where nothing would be left to learn."""
        names = [name for name, _ in model.named_parameters()]
        for key in self.freeze:
            if not any(matches(key, name) for name in names):
                tops = sorted({".".join(plain_name(name).split(".")[:3]) for name in names})
                raise UserError(f"model.freeze: no parameter is named like '{key}'; there are {', '.join(f'{top}*' for top in tops[:8])}")
        frozen = self.frozen(model, 0)
        if not any(p.requires_grad and name not in frozen for name, p in model.named_parameters()):
            raise UserError("model.freeze: nothing is left to learn at the first update")

    def active(self, updates: int | None) -> list[str]:
        """The keys that hold after so many updates; None for those that always do."""
        return [key for key, f in self.freeze.items() if f.until_update is None or (updates is not None and updates < f.until_update)]

    def frozen(self, model: FusionModel, updates: int | None) -> frozenset[str]:
        """The names of the parameters that are held after so many updates; None for those that always are."""
        active = self.active(updates)
        return frozenset(name for name, _ in model.named_parameters() if any(matches(key, name) for key in active))

    def later(self, model: FusionModel) -> dict[str, int]:
        """Those that are held at first and will learn: by name, after how many updates."""
        thawing = self.frozen(model, 0) - self.frozen(model, None)
        untils = {key: f.until_update for key, f in self.freeze.items() if f.until_update is not None}
        return {name: max(until for key, until in untils.items() if matches(key, name)) for name in thawing}

    def apply(self, model: FusionModel, updates: int) -> bool:
        """Hold what is to be held after so many updates; whether anything learns that didn't before."""
        if not self.freeze:
            return False
        before, active = self.held, self.active(updates)
        if active != self.was_active:
            self.was_active = active
            self.held = self.frozen(model, updates)
            self.hold(model, before or frozenset(), self.held)
        for module in self.still:  # what evaluates in the middle of training puts everything into training mode again
            module.eval()
        return before is not None and self.held is not None and bool(before - self.held)

    def hold_again(self, model: FusionModel) -> None:
        """After modules of the model were replaced by others with the same parameters."""
        if self.held is not None:
            self.hold(model, self.held, self.held)

    def hold(self, model: FusionModel, before: frozenset[str], now: frozenset[str]) -> None:
        for name, p in model.named_parameters():
            if name in before | now:
                p.requires_grad_(name not in now)
        whole = {part for part in model.parts() if {name for name, _ in model.named_parameters() if part_of(name) == part} <= now}
        for part, module in model.parts().items():
            if isinstance(module, Encoder) and part in self.freeze:
                module.frozen = part in whole
                module.train(model.training)
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.weight is not None]
        self.still = [m for m in norms if not m.weight.requires_grad] + ([model.head] if "head" in whole else [])


def matches(key: str, name: str) -> bool:
    """Whether the key of a freeze is the part that a parameter belongs to, or a pattern of its plain name."""
    return part_of(name) == key or fnmatchcase(plain_name(name), key)


def wrap_again(trainer: Trainer) -> None:
    """DDP exchanges the gradients of what learnt when it wrapped the model: after a thaw, let it look again."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        strategy.model = strategy.lightning_module
        strategy.configure_ddp()
