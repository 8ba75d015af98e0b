"""Continuing a run: what it must have, and what may differ from before."""

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
from fusion.training.engine import refuse_other_format


def resumed_run(arguments: Sequence[str]) -> Path | None:
    """The folder after --resume, checked."""
    folders = [Path(word) for is_value, word in words(arguments, "--resume") if is_value]
    if not folders:
        return None
    folder = folders[-1]
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"can't resume '{folder}': it has no recipe.yaml; expected the run folder that fit printed")
    if not has_checkpoint(folder):
        raise UserError(f"can't resume '{folder}': it has no checkpoints/last.ckpt; it ended before its first checkpoint, so start it anew")
    return folder


def has_checkpoint(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("*.ckpt"))


# What changes nothing that is past: on what, and how fast, it is computed; what is printed and logged; when it ends.
MAY_DIFFER = (
    *("trainer.devices", "trainer.num_nodes", "trainer.accelerator", "trainer.strategy", "trainer.accumulate_grad_batches"),
    *("data.device_batch_size", "data.eval_batch_size", "data.num_workers", "data.memory_gib", "data.cache"),
    *("trainer.log_every_n_steps", "trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.profiler", "checkpoint."),
    *("trainer.max_epochs", "trainer.max_steps", "trainer.max_time"),
    *("data.manifest", "data.val_manifest", "data.test_manifest"),  # where they are; what they hold is looked at
)


def refuse_difference(now: str, then: str, arguments: Sequence[str] = (), fix: str = "Leave them out") -> None:
    """A resumed run keeps its recipe: anything else would be a different run that looks like the old one. But it may have other devices:
    the global batches, and their order, are the same on any number; and another end, by which the schedule becomes another (the plan
    says so). An option that the old recipe doesn't know, since it is newer, may have its default: that is what the run had.
    """
    new, old = flat(yaml.safe_load(now)), flat(yaml.safe_load(then))
    given = [word.partition("=")[0].removeprefix("--").removesuffix("+") for word in arguments if word.startswith("--")]
    kept = [key for key in {**old, **new} if inside(key, old) or any(f"{key}.".startswith(f"{name}.") for name in given)]
    different = [
        f"{key} is {new.get(key)} (was {old.get(key)})" for key in kept if new.get(key) != old.get(key) and not key.startswith(MAY_DIFFER)
    ]
    if different:
        raise UserError(f"--resume keeps the run's recipe; these differ: {'; '.join(different[:5])}. {fix}, or start a new run")


def inside(key: str, settings: dict[str, Any]) -> bool:
    """Whether the settings have this key, or a value where it would be nested.

    >>> inside("model.rates.head", {"model.rates": None}), inside("model.rates", {"model.head": None})
    (True, False)
    """
    names = key.split(".")
    return any(".".join(names[:depth]) in settings for depth in range(1, len(names) + 1))


def flat(settings: Any, above: str = "") -> dict[str, Any]:
    """Settings by their dotted keys."""
    if not isinstance(settings, dict) or not settings:
        return {above: settings}
    return {key: value for name, inner in settings.items() for key, value in flat(inner, f"{above}.{name}" if above else name).items()}


def to_go_on_from(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds; its tensors stay on the disk. Raises UserError for one of another version."""
    held: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    refuse_other_format(held)
    return held


def refuse_other_data(folder: Path, checkpoint: Path, then: dict[str, Any], data: FusionData) -> None:
    """A resumed run keeps its data: classes, tokenizer, image sizes, rows and image files. Raises UserError that says what differs; what
    differs without harm is noted in the ledger. then: what the checkpoint holds of the task.
    """
    different = processor_differences(then["processor"], data.processor)
    record = Record.read(folder)
    if record is not None and record.digest() == then["samples"]:
        rows = record.difference(data.record)
        if rows.samples:
            different += rows.sentences
        elif rows.others and data.reads_columns:
            different.append(f"{rows} ({data.reads_columns} orders the curriculum)")
        elif rows.sentences:
            data.ledger.note(f"the table has changed since the run began, in nothing that training reads: {rows}")
    elif then["samples"] != data.record.digest():
        different.append("its samples are not those that it was trained on")
    if different:
        raise UserError(
            f"can't resume {folder}: its data has changed: {'; '.join(different)}. Restore it, or start a new run "
            f"(from these weights: --init_from={checkpoint})"
        )


def processor_differences(then: dict[str, Any], processor: Processor) -> list[str]:
    """How samples become tensors, and what the outputs mean, where it differs."""
    found: list[str] = []
    now = processor.state()
    names, before = (state["task"]["learnt"].get("names", []) for state in (now, then))
    if names != before:
        gone = [name for name in before if name not in names]
        new = [name for name in names if name not in before]
        named = [f"{what} {listed(them)}" for what, them in (("without", gone), ("new", new)) if them]
        found.append(f"{len(names)} classes where there were {len(before)} ({', '.join(named)})")
    elif then["task"]["learnt"] != now["task"]["learnt"]:
        found.append(f"targets are {now['task']['learnt']} where they were {then['task']['learnt']}")
    if [*then["inputs"]] != [*now["inputs"]]:
        found.append(f"its inputs are {', '.join(now['inputs'])} where they were {', '.join(then['inputs'])}")
    for name, kind in processor.inputs.items():
        state = then["inputs"].get(name)
        if state is not None and state["class"] == now["inputs"][name]["class"]:
            found += kind.differences(state["learnt"])
    return found


def refuse_past_end(held: dict[str, Any], max_epochs: int | None, max_steps: int) -> None:
    """Raises UserError where the run is to end before what is done in its checkpoint."""
    epochs = held["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    begun = max(epochs, held["loops"]["fit_loop"]["epoch_progress"]["current"]["started"])
    updates = held["global_step"]
    if max_epochs is not None and 0 <= max_epochs < begun:
        more = f", and epoch {begun} is begun" if begun > epochs else ""
        raise UserError(f"--trainer.max_epochs={max_epochs}, but {epochs} epochs are done{more}")
    if 0 <= max_steps < updates:
        raise UserError(f"--trainer.max_steps={max_steps}, but {updates:,} updates are made")
