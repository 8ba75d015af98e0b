"""How a raw sample becomes tensors, and what the outputs mean: all that a checkpoint needs beside the model."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from fusion.data.tokenizer import Tokenizer
from fusion.tasks import Task

Resize = Literal["squash", "crop", "pad"]


@dataclass(frozen=True)
class ImageSpec:
    """How images come to one size (height, width)."""

    size: tuple[int, int]
    resize: Resize = "squash"
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    max_megapixels: float = 100.0


@dataclass
class Processor:
    """Image size, tokenizer and task; None for a modality that the model does not have."""

    image: ImageSpec | None
    tokenizer: Tokenizer | None
    task: Task

    def state(self) -> dict[str, Any]:
        """Plain data from which `from_state` makes the same processor."""
        return {
            "image": None if self.image is None else asdict(self.image) | {"size": list(self.image.size)},
            "tokenizer": None if self.tokenizer is None else self.tokenizer.state(),
            "task": self.task.state(),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Processor":
        image, tokenizer = state["image"], state["tokenizer"]
        return cls(
            image=None if image is None else ImageSpec(**image | {"size": tuple(image["size"])}),
            tokenizer=None if tokenizer is None else Tokenizer.from_state(tokenizer),
            task=Task.from_state(state["task"]),
        )
