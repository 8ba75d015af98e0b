"""Converts raw samples to tensors and outputs to predictions: the state that a checkpoint stores besides the model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusion.data.kinds import Kind
from fusion.tasks import Task


@dataclass
class Processor:
    """The inputs of a model, by name in the order of its encoders, and its task."""

    inputs: Mapping[str, Kind]
    task: Task

    def state(self) -> dict[str, Any]:
        """Plain data from which `from_state` makes the same processor."""
        return {"inputs": {name: kind.state() for name, kind in self.inputs.items()}, "task": self.task.state()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Processor":
        return cls({name: Kind.from_state(kind) for name, kind in state["inputs"].items()}, Task.from_state(state["task"]))
