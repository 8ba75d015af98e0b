"""Resuming a run: the checks of its folder, its recipe and its data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from fusion.data import FusionData
from fusion.data.processor import Processor
from fusion.data.record import Record
from fusion.data.table import listed
from fusion.errors import UserError
from fusion.settings.parser import words
from fusion.training.engine import reject_other_format


def resumed_run(arguments: Sequence[str]) -> Path | None:
    """The run folder given by --resume, or None. Raises UserError if it can't be resumed."""
    folders = [Path(word) for is_value, word in words(arguments, "--resume") if is_value]
    if not folders:
        return None
    folder = folders[-1]
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"can't resume '{folder}': it has no recipe.yaml; expected the run folder printed by fit")
    if not has_checkpoint(folder):
        raise UserError(f"can't resume '{folder}': it has no checkpoints/last.ckpt: it ended before its first checkpoint; start a new run")
    return folder


def has_checkpoint(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("*.ckpt"))


# Settings that don't affect the updates already made: devices and speed, output and logging, and the end of the run.
MAY_DIFFER = (
    *("trainer.devices", "trainer.num_nodes", "trainer.accelerator", "trainer.strategy", "trainer.accumulate_grad_batches"),
    *("data.device_batch_size", "data.eval_batch_size", "data.num_workers", "data.memory_gib", "data.cache"),
    *("trainer.log_every_n_steps", "trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.profiler", "checkpoint."),
    *("trainer.max_epochs", "trainer.max_steps", "trainer.max_time"),
    *("data.manifest", "data.val_manifest", "data.test_manifest", "model.teacher.runs"),  # paths; the contents are checked
)


def reject_recipe_changes(now: str, then: str, arguments: Sequence[str] = (), fix: str = "Leave them out") -> None:
    """Raises UserError if the recipe of a resumed run has changed. Devices may change, since global batches and their order don't depend on
    them; so may the end of the run, which changes the schedule (the plan says so). An option that the old recipe doesn't have, being newer,
    may have its default.
    """
    new, old = flat(yaml.safe_load(now)), flat(yaml.safe_load(then))
    given = [word.partition("=")[0].removeprefix("--").removesuffix("+") for word in arguments if word.startswith("--")]
    keys = [key for key in {**old, **new} if inside(key, old) or any(f"{key}.".startswith(f"{name}.") for name in given)]
    different = [
        f"{key} is {new.get(key)} (was {old.get(key)})" for key in keys if new.get(key) != old.get(key) and not key.startswith(MAY_DIFFER)
    ]
    if different:
        raise UserError(f"--resume keeps the run's recipe, but these differ: {'; '.join(different[:5])}. {fix}, or start a new run")


def inside(key: str, settings: dict[str, Any]) -> bool:
    """Whether the settings have this key, or a value for one of its parents.

    >>> inside("model.rates.head", {"model.rates": None}), inside("model.rates", {"model.head": None})
    (True, False)
    """
    names = key.split(".")
    return any(".".join(names[:depth]) in settings for depth in range(1, len(names) + 1))


def flat(settings: Any, above: str = "") -> dict[str, Any]:
    """The settings, flattened to dotted keys."""
    if not isinstance(settings, dict) or not settings:
        return {above: settings}
    return {key: value for name, inner in settings.items() for key, value in flat(inner, f"{above}.{name}" if above else name).items()}


def load_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """The contents of a checkpoint, with memory-mapped tensors. Raises UserError for one of another version."""
    checkpoint_state: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    reject_other_format(checkpoint_state)
    return checkpoint_state


def reject_data_changes(folder: Path, checkpoint: Path, then: dict[str, Any], data: FusionData) -> None:
    """Raises UserError if the data of a resumed run has changed: classes, tokenizer, image sizes, rows or image files. Changes in what
    training doesn't read are noted in the issues. then: the checkpoint's "fusion" entry.
    """
    different = processor_differences(then["processor"], data.processor)
    record = Record.read(folder)
    if record is not None and record.digest() == then["samples"]:
        changes = record.difference(data.record)
        if changes.samples:
            different += changes.sentences
        elif changes.others and data.curriculum_column:
            different.append(f"{changes} ({data.curriculum_column} orders the curriculum)")
        elif changes.sentences:
            data.issues.note(f"the table has changed since the run began, but nothing that training reads: {changes}")
    elif then["samples"] != data.record.digest():
        different.append("its samples are not those of the run")
    if different:
        raise UserError(
            f"can't resume {folder}: its data has changed: {'; '.join(different)}. Restore it, or start a new run "
            f"(from these weights: --init_from={checkpoint})"
        )


def processor_differences(then: dict[str, Any], processor: Processor) -> list[str]:
    """The differences in how samples become tensors, and in what the outputs mean."""
    differences: list[str] = []
    now = processor.state()
    names, before = (state["task"]["learnt"].get("names", []) for state in (now, then))
    if names != before:
        removed = [name for name in before if name not in names]
        added = [name for name in names if name not in before]
        named = [f"{what} {listed(them)}" for what, them in (("without", removed), ("new", added)) if them]
        differences.append(f"{len(names)} classes instead of {len(before)} ({', '.join(named)})")
    else:
        targets, earlier = ({k: v for k, v in one["task"]["learnt"].items() if k not in processor.task.tuned} for one in (now, then))
        if targets != earlier:
            differences.append(f"targets are {targets} instead of {earlier}")
    if [*then["inputs"]] != [*now["inputs"]]:
        differences.append(f"its inputs are {', '.join(now['inputs'])} instead of {', '.join(then['inputs'])}")
    for name, kind in processor.inputs.items():
        state = then["inputs"].get(name)
        if state is not None and state["class"] == now["inputs"][name]["class"]:
            differences += kind.differences(state["learnt"])
    return differences


def reject_end_in_the_past(checkpoint_state: dict[str, Any], max_epochs: int | None, max_steps: int) -> None:
    """Raises UserError if the run would end before the position of its checkpoint."""
    epochs = checkpoint_state["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    started = max(epochs, checkpoint_state["loops"]["fit_loop"]["epoch_progress"]["current"]["started"])
    updates = checkpoint_state["global_step"]
    if max_epochs is not None and 0 <= max_epochs < started:
        more = f" and epoch {started} has started" if started > epochs else ""
        raise UserError(f"--trainer.max_epochs={max_epochs}, but {epochs} epochs are finished{more}")
    if 0 <= max_steps < updates:
        raise UserError(f"--trainer.max_steps={max_steps}, but {updates:,} updates have been made")
