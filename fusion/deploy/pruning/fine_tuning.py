"""Training of a pruned model by the recipe of its run: an ordinary run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fusion.deploy.pruning.source import RECIPE
from fusion.errors import UserError
from fusion.session import train

EPOCHS, RATE = 5, 0.5


def fine_tune(start: str | Path, out: str | Path, *, epochs: int = EPOCHS, rate: float = RATE, options: Sequence[str] = ()) -> int:
    """Trains a run in the folder `out` from a pruned or sparse model, by the recipe of its run; returns the exit status of fit.

    Args:
        start: folder that `prune` or `sparsify` wrote.
        out: folder of the run.
        epochs: of training.
        rate: the learning rate relative to the recipe's, at which what the model has learned would be lost at first.
        options: further settings, as of fit, which come last: ["--data.batch_size=64"].

    Raises UserError for mistakes in the options.
    """
    if epochs < 1:
        raise UserError(f"--epochs is {epochs}; expected at least 1")
    check_training(Path(start), rate)
    folder, begin = Path(out).expanduser(), Path(start).expanduser()
    words = ["--config", str(begin / RECIPE), f"--init_from={begin.resolve()}", f"--trainer.max_epochs={epochs}"]
    if rate != 1:
        words.append(f"--model.optimizer.init_args.lr={rate * learning_rate(begin)!r}")
    folder.mkdir(parents=True, exist_ok=True)
    return train([*words, *options], folder).status


def check_training(run: Path, rate: float) -> None:
    """Raises UserError for a rate out of range, and where a run's recipe has no learning rate that it could be relative to."""
    if not rate > 0:
        raise UserError(f"--rate is {rate:g}; expected a number above 0, such as {RATE}")
    if rate != 1 and (run / RECIPE).is_file():
        learning_rate(run)


def learning_rate(folder: Path) -> float:
    """The learning rate of a run's recipe. Raises UserError if it has none."""
    recipe: Any = OmegaConf.to_container(OmegaConf.load(folder / RECIPE))
    optimizer = recipe["model"].get("optimizer")
    rate = (optimizer.get("init_args") or {}).get("lr") if isinstance(optimizer, dict) else None
    if not isinstance(rate, int | float):
        raise UserError(f"--rate: {folder / RECIPE} has no model.optimizer.init_args.lr, to which it is relative; expected --rate=1")
    return float(rate)
