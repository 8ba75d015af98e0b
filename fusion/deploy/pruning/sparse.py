"""Unstructured pruning of a run: single weights are set to zero. By itself that makes nothing faster, and no file smaller."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fusion.deploy.pruning.source import Source, check_free, write_start
from fusion.errors import UserError
from fusion.training.zeros import matrices


@dataclass(frozen=True)
class Sparse:
    """A sparse model.

    folder: the model, not yet trained further. by_part: for each part the number of weights in linear layers and convolutions, and how many
    of them are zero. note: about the checkpoint, or "".
    """

    folder: Path
    by_part: dict[str, tuple[int, int]]
    note: str


def sparsify(run: str | Path, out: str | Path, *, share: float = 0.5, checkpoint: str = "best") -> Sparse:
    """Sets the smallest weights of a run's linear layers and convolutions to zero, over all layers together.

    This saves neither time nor memory by itself: the weights keep their places. It is for runtimes that skip zeros, and for files that are
    compressed. The result is a folder from which `fine_tune` trains a run, whose zeros stay zero.

    Args:
        run: run folder.
        out: folder to write; it must not have anything in it.
        share: of these weights that are set to zero, above 0 and below 1.
        checkpoint: best or last.

    Raises UserError for a run without checkpoint or with adapters, and a share out of range.
    """
    if not 0 < share < 1:
        raise UserError(f"--share is {share:g}; expected a share above 0 and below 1, such as 0.5")
    folder = Path(out).expanduser()
    check_free(folder)
    source = Source(run, checkpoint)
    if source.about["adapters"]:
        raise UserError(f"{source.run} has adapters, whose weights begin at zero; expected a run without")
    weights = matrices(source.predictor.model)
    zero_smallest(list(weights.values()), share)
    source.recipe["model"]["keep_zeros"] = True
    write_start(folder, source, source.about, source.recipe)
    by_part: dict[str, tuple[int, int]] = {}
    for name, module in source.predictor.model.parts().items():
        own = list(matrices(module).values())
        by_part[name] = sum(weight.numel() for weight in own), sum(int((weight == 0).sum()) for weight in own)
    return Sparse(folder, by_part, source.note)


@torch.no_grad()
def zero_smallest(weights: list[Tensor], share: float) -> None:
    """Sets this share of all the weights to zero, the smallest in magnitude; of equal ones the first."""
    magnitudes = torch.cat([weight.detach().abs().flatten().float() for weight in weights])
    count = round(share * len(magnitudes))
    if not count:
        return
    gone = torch.zeros(len(magnitudes), dtype=torch.bool, device=magnitudes.device)
    gone[magnitudes.argsort(stable=True)[:count]] = True
    start = 0
    for weight in weights:
        weight.masked_fill_(gone[start : start + weight.numel()].view(weight.shape), 0.0)
        start += weight.numel()
