"""Checks of a teacher: whether it fits the student, and whether it was trained on samples that the student is scored on."""

from pathlib import Path

from fusion.data.module import FusionData
from fusion.data.record import Record
from fusion.errors import UserError
from fusion.predictor import Predictor
from fusion.tasks import Task


def check_teacher(run: str, predictor: Predictor, task: Task, data: FusionData) -> None:
    """Raises UserError for a teacher of another task, without one of the student's classes, or that reads other inputs."""
    teacher = predictor.processor.task
    if type(teacher) is not type(task):
        raise UserError(f"model.teacher: the task of {run} is {type(teacher).__name__}, but model.task is {type(task).__name__}")
    missing = [name for name in task.names if name not in teacher.names]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"model.teacher: {run} doesn't know {', '.join(repr(name) for name in missing[:3])}{more}, which train has; expected a teacher "
            f"of all {len(task.names)} of its names (it knows {len(teacher.names)})"
        )
    table = data.splits["train"].table
    for name, kind in predictor.processor.inputs.items():
        own = table.kinds.get(name)
        if own is None:
            raise UserError(
                f"model.teacher: {run} reads '{name}', but the inputs of this run are {', '.join(table.kinds)}; expected a teacher that "
                "reads no others"
            )
        if type(own) is not type(kind) or (len(kind.columns) > 1 and own.columns != kind.columns):
            raise UserError(
                f"model.teacher: {run} reads '{name}' as {type(kind).__name__} of {len(kind.columns)} columns, this run as "
                f"{type(own).__name__} of {len(own.columns)}; expected the same"
            )
    without = [i for i in range(len(table)) if all(table.inputs[name][i] is None for name in predictor.modalities)]
    if without:
        i, read = without[0], ", ".join(predictor.modalities)
        raise UserError(
            f"model.teacher: {len(without):,} training samples have none of the inputs that {run} reads ({read}); the first: "
            f"{table.files[i]}, row {table.rows[i]}"
        )


def trained_on(run: Path, record: Record) -> int:
    """Number of the validation and test samples of a record that were training samples of a run; 0 where it has no record."""
    earlier = Record.read(run)
    if earlier is None or not set(earlier.content) <= record.columns.keys():
        return 0
    pairs = zip(earlier.match(record), record.columns["split"], strict=True)
    return sum(split in ("val", "test") and then is not None and earlier.columns["split"][then] == "train" for then, split in pairs)
