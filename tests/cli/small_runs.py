"""What the tests of the commands share: a small recipe, and the types of their fixtures."""

import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = [
    "--recipe=quickstart",
    "--data.preparer.scenes=150",
    "--data.preparer.questions_per_scene=4",
    "--data.batch_size=16",
    "--model.head.init_args.dim=32",
    "--model.head.init_args.depth=1",
    "--trainer.max_epochs=1",
    "--trainer.log_every_n_steps=1",
    "--trainer.accelerator=cpu",
]

Run = Callable[..., subprocess.CompletedProcess[str]]
InProcess = Callable[[str, list[str]], tuple[int, str]]
