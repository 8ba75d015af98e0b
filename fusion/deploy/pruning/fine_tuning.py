"""Training of a pruned model by the recipe of its run: an ordinary run."""

from collections.abc import Sequence
from pathlib import Path

from fusion.deploy.pruning.source import RECIPE
from fusion.errors import UserError
from fusion.session import train

EPOCHS = 2


def fine_tune(start: str | Path, out: str | Path, *, epochs: int = EPOCHS, options: Sequence[str] = ()) -> int:
    """Trains a run in the folder `out` from a pruned or sparse model, by the recipe of its run; returns the exit status of fit.

    Args:
        start: folder that `prune` or `sparsify` wrote.
        out: folder of the run.
        epochs: of training.
        options: further settings, as of fit: ["--model.optimizer.init_args.lr=0.001"].

    Raises UserError for mistakes in the options.
    """
    if epochs < 1:
        raise UserError(f"--epochs is {epochs}; expected at least 1")
    folder, begin = Path(out).expanduser(), Path(start).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    words = ["--config", str(begin / RECIPE), f"--init_from={begin.resolve()}", f"--trainer.max_epochs={epochs}"]
    return train([*words, *options], folder).status
