"""Checks of the gradients that stop a run: values that are not finite, and parameters without a gradient, both by name."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from fusion.console import print_rank_zero
from fusion.errors import UserError
from fusion.model import part_of, plain_name
from fusion.training.callbacks.run_folder import RunFolder
from fusion.training.engine import Engine
from fusion.training.optim.precision import scaler_of

MOST_NAMES = 3
MOST_IDS = 5
MOST_SKIPPED = 50


class Guard(Callback):
    """Checks the gradients of every update, after they are summed over ranks and accumulated batches and before the optimiser step.

    A gradient that is not finite stops the run. The message has the loss, the modalities and the parameters; `non_finite.json` in the run
    folder has the ids of the update's samples. Every rank sees the same gradients, so that all stop. With a gradient scaler such updates
    are skipped by GradScaler, and only 50 in a row stop the run.

    A parameter without a gradient at the first update also stops the run, unless `allow_unused` is set.
    """

    def __init__(self, run: RunFolder | None = None) -> None:
        self.run = run
        self.first = True
        self.batches: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.batches.clear()
        self.batches.append(batch)

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        assert isinstance(module, Engine)
        if self.first:
            self.first = False
            self.report_unused(trainer, module)
        if scaler_of(trainer.precision_plugin) is None and not finite(gradients(optimizer)):
            self.stop(trainer, module)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(module, Engine)
        if module.skipped_in_a_row >= MOST_SKIPPED:
            self.stop(trainer, module, f"{MOST_SKIPPED} updates in a row overflowed at every loss scale; ")

    def report_unused(self, trainer: Trainer, engine: Engine) -> None:
        assert engine.model is not None
        unused = [name for name, p in engine.model.named_parameters() if p.requires_grad and p.grad is None]
        if not unused:
            return
        message = f"parameters that got no gradient at the first update: {by_modality(unused)}"
        if not engine.allow_unused:
            raise UserError(
                f"{message}. They would not be trained, and DDP would fail on them; freeze them (--model.freeze), remove them, or allow "
                "them: --model.allow_unused=true (with DDP also --trainer.strategy=ddp_find_unused_parameters_true)"
            )
        if trainer.is_global_zero:
            print_rank_zero(f"warning: {message}")

    def stop(self, trainer: Trainer, engine: Engine, why: str = "") -> None:
        """Report what is not finite and where it first occurs; raises UserError on every rank."""
        assert engine.model is not None
        bad = [name for name, p in engine.model.named_parameters() if p.grad is not None and not finite([p.grad])]
        loss = float(engine.means.of_update(engine)["loss"])
        # All batches, on every rank: a forward pass may contain collectives.
        origins = [first_not_finite(engine, batch) for batch in self.batches]
        origin = next(filter(None, origins), "")
        ids = self.ids(trainer)
        report = {
            "update": engine.updates + 1,
            "loss": str(loss),
            "began_in": origin,
            "parameters": [plain_name(name) for name in bad],
            "ids": ids,
        }
        where = ""
        if trainer.is_global_zero and self.run is not None and self.run.folder is not None:
            path = self.run.folder / "non_finite.json"
            path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            where = f"; all are in {path}"
        shown = ", ".join(ids[:MOST_IDS]) + (", ..." if len(ids) > MOST_IDS else "")
        gradients = f"the gradients of {by_modality(bad)} are not finite" if bad else "every gradient is finite"
        state = "" if math.isfinite(loss) else f"the loss is {loss}; "
        raise UserError(
            f"update {engine.updates + 1}: {why}{state}{gradients}{f'; it began in {origin}' if origin else ''}. "
            f"Ids of its samples: {shown}{where}. Inspect them, or try a lower rate, a longer warm-up or --trainer.gradient_clip_val=1"
        )

    def ids(self, trainer: Trainer) -> list[str]:
        """Ids of the update's samples, over all ranks."""
        samples = torch.cat([batch.sample for batch in self.batches])
        if trainer.world_size > 1:
            gathered: Tensor = trainer.strategy.all_gather(samples)
            samples = gathered.flatten()
        ids = trainer.datamodule.splits["train"].table.ids  # type: ignore[attr-defined]
        return [str(ids[sample]) for sample in samples.tolist()]


def gradients(optimizer: Optimizer) -> list[Tensor | None]:
    return [p.grad for group in optimizer.param_groups for p in group["params"]]


def finite(tensors: Iterable[Tensor | None]) -> bool:
    """Whether all values are finite; synchronises with the device once if they are."""
    present = [t for t in tensors if t is not None]
    if not present:
        return True
    # The 2-norm is the fastest, but its squares overflow before the values do: then the 1-norm decides.
    return any(is_finite(get_total_norm(present, norm_type=power)) for power in (2.0, 1.0))


def is_finite(total: Tensor) -> bool:
    return bool((total.full_tensor() if isinstance(total, DTensor) else total).isfinite())


def first_not_finite(engine: Engine, batch: Any) -> str:
    """The first parameter or, in a forward pass of the batch, the first module output that is not finite; "" if all are finite."""
    assert engine.model is not None
    for name, p in engine.model.named_parameters():
        if not finite([p.detach()]):
            return f"parameter {plain_name(name)}"
    first: list[str] = []

    def check(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not first and isinstance(output, Tensor) and output.is_floating_point() and not bool(output.isfinite().all()):
                first.append(f"the output of {plain_name(name)} ({type(module).__name__})")

        return hook

    hooks = [module.register_forward_hook(check(name)) for name, module in engine.model.named_modules()]
    try:
        with torch.no_grad(), engine.trainer.precision_plugin.forward_context():
            engine.model(batch.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return first[0] if first else ""


def by_modality(names: Iterable[str]) -> str:
    """Parameter names grouped by the part that they belong to.

    >>> by_modality(["encoders.text.body.a", "encoders.text.body.b", "head.classifier.bias"])
    'text (text.body.a, text.body.b) and head (head.classifier.bias)'
    """
    parts: dict[str, list[str]] = defaultdict(list)
    for name in names:
        parts[part_of(name)].append(plain_name(name))
    descriptions = []
    for part, members in parts.items():
        more = f" and {len(members) - MOST_NAMES} more" if len(members) > MOST_NAMES else ""
        descriptions.append(f"{part} ({', '.join(members[:MOST_NAMES])}{more})")
    return " and ".join(descriptions)
