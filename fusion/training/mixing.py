"""Mixup and CutMix of whole samples: all inputs and the target are mixed together, with one partner and one weight."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Beta
from torch.nn.functional import pad

from fusion.data.samples import Batch
from fusion.encoders.base import Encoder, fill_absent
from fusion.errors import UserError
from fusion.inputs import Images, Mixture
from fusion.model import FusionModel, depths_of
from fusion.tasks import Task
from fusion.training.distributed.collectives import summed
from fusion.training.means import OnDevice, sum_dtype

FIGURES = ("mixed_share", "mixed_weight")


@dataclass
class Mixing:
    """Mixes samples of a training batch in pairs: images, texts, tables and target of a sample together.

        x <- w x + (1 - w) x_partner            loss <- w l(output, y) + (1 - w) l(output, y_partner)

    Mixup (Zhang et al., 2018, "mixup: Beyond Empirical Risk Minimization") mixes pixels, and draws w from Beta(a, a). CutMix (Yun et al.,
    2019, "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features") takes a box of the partner's image, and
    w is exactly the share of pixels outside it (with several inputs of images of different sizes, the mean of their shares). Both mix word
    embeddings and the tokens of columns by the same w (wordMixup: Guo et al., 2019, "Augmenting Data with Mixup for Sentence
    Classification"); after the end of the shorter text, and in missing cells, its vectors are zero. Numbers to predict are mixed
    themselves (C-Mixup: Yao et al., 2022), for other targets the losses are.

    A batch (a device's share of an accumulation step) has one w and one random permutation of its samples. Only samples with the same
    inputs present, and as many images, are mixed with each other; a sample that has no other such in its batch stays as it is. Images
    that samples of a batch share are encoded once for each sample where the batch is mixed.

    Args:
        mixup: a of mixup's Beta distribution: small values keep w near 0 or 1, 1 is uniform; 0 for no mixup.
        cutmix: a of CutMix's, which needs an input of images; 0 for no CutMix.
        probability: that a batch is mixed; above 0, up to 1.
        cutmix_share: with both, the share of mixed batches that get CutMix, 0.5 at the default; between 0 and 1.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    probability: float = 1.0
    cutmix_share: float | None = None

    def check(self) -> None:
        """Raises UserError for values out of range."""
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"model.mixing: {name} is {getattr(self, name)}; expected a number of at least 0")
        if not self.mixup and not self.cutmix:
            raise UserError("model.mixing: mixup and cutmix are both 0; give one of them, such as mixup 0.2, or leave out model.mixing")
        if not 0 < self.probability <= 1:
            raise UserError(f"model.mixing: probability is {self.probability}; expected a probability above 0, up to 1")
        if self.cutmix_share is not None and not (self.mixup and self.cutmix):
            raise UserError("model.mixing: cutmix_share is an option of mixup and cutmix together; leave it out, or give both")
        if self.cutmix_share is not None and not 0 < self.cutmix_share < 1:
            raise UserError(f"model.mixing: cutmix_share is {self.cutmix_share}; expected a share between 0 and 1")

    def __str__(self) -> str:
        parts = [f"{title} (Beta {a:g})" for title, a in (("mixup", self.mixup), ("CutMix", self.cutmix)) if a]
        return f"{' or '.join(parts)} of {self.probability:.0%} of the batches"


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    bottom: int
    left: int
    right: int

    def share(self, size: tuple[int, int]) -> float:
        """The share of the pixels of an image (height, width) that are in the box."""
        return (self.bottom - self.top) * (self.right - self.left) / (size[0] * size[1])


class Mixer:
    """Mixes the batches of a training, and counts how many samples, by which method and how much.

    sums: over the whole run, on this rank; those of a resumed run's checkpoint are on rank 0.
    """

    def __init__(self, settings: Mixing, task: Task) -> None:
        settings.check()
        if not task.mixable:
            what = type(task).__name__
            raise UserError(f"model.mixing: the target of model.task={what} can't be mixed; leave out model.mixing, or choose another task")
        self.settings = settings
        self.sums: dict[str, Tensor | float] = dict.fromkeys(("samples", "mixup", "cutmix", "lesser"), 0)

    def check_encoders(self, model: FusionModel) -> None:
        """Raises UserError for encoders that can't encode mixed inputs, and for CutMix without images."""
        takes = []
        for name, encoder in model.encoders.items():
            assert isinstance(encoder, Encoder)
            takes.append(encoder.takes)
            try:
                encoder.check_mixing(model.head.stage, depths_of(model.head, name))
            except UserError as error:
                raise UserError(f"model.mixing: '{name}': {error}; leave out model.mixing, or choose another encoder") from error
        if self.settings.cutmix and Images not in takes:
            raise UserError(f"model.mixing: cutmix cuts images, but the inputs are {', '.join(model.encoders)}; leave it out and use mixup")

    def mix(self, batch: Batch) -> Batch:
        """The batch, mixed or not, with its `mixture`."""
        self.sums["samples"] += len(batch.target)
        cut, weight, boxes = self.draw(batch.inputs)
        if not 0 < weight < 1:  # a box may have no pixel, or all
            return batch
        mixture = Mixture(partners(batch.inputs), torch.full((), weight, device=batch.target.device))
        count = mixed_samples(mixture).sum(dtype=sum_dtype(batch.target.device))
        for name, value in (("cutmix" if cut else "mixup", count), ("lesser", count * min(weight, 1 - weight))):
            self.sums[name] = self.sums[name] + value
        return batch._replace(inputs=mix_inputs(batch.inputs, mixture, boxes), mixture=mixture)

    def draw(self, inputs: Mapping[str, Any]) -> tuple[bool, float, dict[str, Box] | None]:
        """Whether it is CutMix, the weight (1: not mixed), and by input of images the box to cut; on the host, by torch's own generator,
        which is seeded each step."""
        settings = self.settings
        mixes, cuts, *centre = torch.rand(4, device="cpu").tolist()
        cut = bool(settings.cutmix) and (not settings.mixup or cuts < (0.5 if settings.cutmix_share is None else settings.cutmix_share))
        if mixes >= settings.probability:
            return cut, 1.0, None
        a = torch.tensor(settings.cutmix if cut else settings.mixup, dtype=torch.float64, device="cpu")
        weight = float(Beta(a, a).sample())
        if not cut:
            return cut, weight, None
        sizes = {name: (x.pixels.shape[2], x.pixels.shape[3]) for name, x in inputs.items() if isinstance(x, Images)}
        boxes = {name: box_of(1 - weight, (centre[0], centre[1]), size) for name, size in sizes.items()}
        return cut, 1 - sum(box.share(sizes[name]) for name, box in boxes.items()) / len(boxes), boxes

    def figures(self, plain: Callable[[Tensor], dict[str, Tensor]], batch: Batch) -> dict[str, Tensor]:
        """The task's figures of a batch (`plain` gives them by target), for both targets by their weights; the share of its samples that
        are mixed, and the mean of the lesser weight over all its samples (0 for those that aren't)."""
        own = plain(batch.target)
        if batch.mixture is None:
            return own | dict.fromkeys(FIGURES, torch.zeros((), device=batch.target.device))
        partner, weight = batch.mixture
        other = plain(batch.target.index_select(0, partner))
        share = mixed_samples(batch.mixture).float().mean()
        of_mixing = dict(zip(FIGURES, (share, share * torch.minimum(weight, 1 - weight)), strict=True))
        return {name: weight * own[name] + (1 - weight) * other[name] for name in own} | of_mixing

    # Report and checkpoint state

    def totals(self, engine: OnDevice) -> dict[str, float]:
        """The sums over all ranks. A collective: all ranks call it."""
        own = [torch.as_tensor(value, dtype=sum_dtype(engine.device), device=engine.device) for value in self.sums.values()]
        return dict(zip(self.sums, summed(torch.stack(own), engine.trainer.world_size).tolist(), strict=True))

    def load(self, totals: Mapping[str, float], rank: int) -> None:
        """Continue from the totals of a checkpoint."""
        self.sums = dict(totals) if rank == 0 else dict.fromkeys(totals, 0)


def shares(totals: Mapping[str, float]) -> dict[str, float]:
    """The report of a run from its totals: number of samples (each counts in each epoch), the shares of them that were mixed, by method,
    and the mean over the mixed ones of the lesser of both weights. Rounded, so that it doesn't depend on the order of summation.

    >>> shares({"samples": 200, "mixup": 50, "cutmix": 30, "lesser": 16.0})
    {'samples': 200, 'mixed': 0.4, 'mixup': 0.25, 'cutmix': 0.15, 'lesser_weight': 0.2}
    """
    samples, mixed = max(totals["samples"], 1), totals["mixup"] + totals["cutmix"]
    by_method = {"mixed": mixed / samples, "mixup": totals["mixup"] / samples, "cutmix": totals["cutmix"] / samples}
    rounded = {name: round(share, 6) for name, share in (by_method | {"lesser_weight": totals["lesser"] / max(mixed, 1)}).items()}
    return {"samples": int(totals["samples"]), **rounded}


def report(found: Mapping[str, float]) -> str:
    """
    >>> report({"samples": 2000, "mixed": 0.4, "mixup": 0.25, "cutmix": 0.15, "lesser_weight": 0.2})
    'mixing      40.0% of 2,000 training samples (mixup 25.0%, CutMix 15.0%), the lesser of both with a mean weight of 0.200'
    """
    how = f"mixup {found['mixup']:.1%}, CutMix {found['cutmix']:.1%}"
    much = f", the lesser of both with a mean weight of {found['lesser_weight']:.3f}" if found["mixed"] else ""
    return f"mixing      {found['mixed']:.1%} of {found['samples']:,} training samples ({how}){much}"


def box_of(share: float, centre: tuple[float, float], size: tuple[int, int]) -> Box:
    """The box with about this share of the pixels around a centre (y, x in 0..1), cut off at the border, as in Yun et al.

    >>> box_of(0.25, (0.5, 0.0), (8, 8))
    Box(top=2, bottom=6, left=0, right=2)
    """
    half = math.sqrt(share) / 2
    edges = [min(max(round((c + sign * half) * length), 0), length) for c, length in zip(centre, size, strict=True) for sign in (-1, 1)]
    return Box(*edges)


def partners(inputs: Mapping[str, Any]) -> Tensor:
    """(B,) int64, each sample's partner: a random cycle through the samples that have the same inputs, and as many images."""
    columns: list[Tensor] = []
    for x in inputs.values():
        several = x.image_mask if isinstance(x, Images) else None
        columns += [x.present] if several is None else several.unbind(dim=1)
    rows = torch.stack(columns, dim=1)
    order = torch.randperm(len(rows), device=rows.device)
    for column in columns:  # a radix sort, by which equal rows are adjacent
        order = order[column[order].int().argsort(stable=True)]
    ordered = rows[order]
    group = pad((ordered[1:] != ordered[:-1]).any(dim=1).cumsum(0), (1, 0))
    first, end = torch.searchsorted(group, group), torch.searchsorted(group, group, right=True)
    position = torch.arange(len(rows), device=rows.device) + 1
    following = order[torch.where(position == end, first, position)]
    return torch.empty_like(order).scatter(0, order, following)


def mixed_samples(mixture: Mixture) -> Tensor:
    """(B,) bool: which samples are mixed with another one."""
    return mixture.partner != torch.arange(len(mixture.partner), device=mixture.partner.device)


def mix_inputs(inputs: Mapping[str, Any], mixture: Mixture, boxes: Mapping[str, Box] | None) -> dict[str, Any]:
    """The inputs with mixed images, and with the mixture for the encoders of the others. boxes: of CutMix, by input of images."""
    return {
        name: mix_images(x, mixture, None if boxes is None else boxes[name]) if isinstance(x, Images) else x._replace(mixture=mixture)
        for name, x in inputs.items()
    }


def mix_images(x: Images, mixture: Mixture, box: Box | None) -> Images:
    """Images mixed by pixels, or with the partner's pixels in a box; each sample then has its own."""
    pixels, partner, index = x.pixels, mixture.partner, None
    if x.image_index is not None:
        pixels = pixels.index_select(0, x.image_index.flatten())
    if x.image_mask is not None:
        count, positions = x.image_mask.shape
        # Positions without an image hold copies of others, which batch statistics are to have no more of than of the images that are there.
        pixels = fill_absent(pixels, x.image_mask.flatten())
        index = torch.arange(count * positions, device=pixels.device).view(count, positions)
        partner = index.index_select(0, partner).flatten()
    if box is not None:
        top, bottom, left, right = box
        mixed = pixels.clone()
        mixed[:, :, top:bottom, left:right] = pixels[:, :, top:bottom, left:right].index_select(0, partner)
    else:
        pixels = pixels / 255 if pixels.dtype == torch.uint8 else pixels
        mixed = mixture.weight * pixels + (1 - mixture.weight) * pixels.index_select(0, partner)
    return x._replace(pixels=mixed, image_index=index)
