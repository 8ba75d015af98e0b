"""What image encoders share: normalised pixels in, Features of the samples out, each distinct image encoded once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from textwrap import shorten
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fusion.encoders.base import Encoder, fill_absent
from fusion.errors import UserError, first_line, nearest
from fusion.features import Features, masked_mean
from fusion.inputs import Images


class Encoded(NamedTuple):
    """Tokens (U, N, D) and pooled (U, D) of the distinct images."""

    tokens: Tensor
    pooled: Tensor

    def zeros(self, count: int) -> "Encoded":
        """From an encoding of no image, zeros for `count` images, still connected to its graph, whose backward pass must run too."""
        return Encoded(*(x.new_zeros(count, *x.shape[1:]) + x.sum() for x in self))


class ImageEncoder(Encoder):
    """An encoder of Images by a pretrained model, which it normalises the pixels for.

    A subclass sets `body`, `name`, `image_size` and `memory_format`, calls `set_constants`, and reads images by `encode`. The data side
    takes from it the size of the images, and by `data_config` how they are resized.

    library: how messages name the model, before its own name.
    """

    takes = Images
    library: ClassVar[str] = ""

    body: Any
    name: str
    image_size: tuple[int, int]
    memory_format: torch.memory_format = torch.contiguous_format
    data_config: dict[str, Any]
    has_batch_statistics: bool = False
    mean: Tensor
    std: Tensor

    def set_constants(self, mean: Any, std: Any, channels: int) -> tuple[list[float], list[float]]:
        """Registers the mean and standard deviation of each channel, in fractions of white."""
        constants = of_channels("mean", mean, channels), of_channels("std", std, channels)
        for key, values in zip(("mean", "std"), constants, strict=True):
            self.register_buffer(key, torch.tensor(values).view(-1, 1, 1), persistent=False)
        return constants

    @property
    def readable_channels(self) -> tuple[int, ...]:
        """Numbers of channels that images may have; a model of one channel also converts RGB to greyscale."""
        return (3, 1) if len(self.mean) == 1 else (len(self.mean),)

    def example(self) -> Images:
        present = torch.ones(1, dtype=torch.bool, device=self.mean.device)
        pixels = torch.zeros(1, self.readable_channels[0], *self.image_size, device=present.device)
        return Images(pixels, present, any_present=True, all_present=True)

    def encode(self, x: Images | Tensor, run: Callable[[Tensor], list[Encoded]]) -> list[Features]:
        """Applies `run` to the normalised pixels and returns the samples' Features."""
        images = x
        if not isinstance(images, Images):
            images = Images(images, torch.ones(images.shape[0], dtype=torch.bool, device=images.device), any_present=True, all_present=True)
        pixels = images.pixels if images.image_index is not None else self.without_absent(images)
        empty = self.training and images.any_present is False and self.has_synced_statistics
        count = pixels.shape[0]
        if empty:
            pixels = pixels[:0]  # other ranks wait for this one's batch statistics, here those of an empty batch
        pixels = pixels.to(self.mean.dtype) / 255 if pixels.dtype == torch.uint8 else pixels.to(self.mean.dtype)
        if pixels.shape[1] not in self.readable_channels:
            expected = " or ".join(map(str, self.readable_channels))
            raise UserError(f"image encoder: '{self.name}' reads images of {expected} channels, got {pixels.shape[1]}")
        if len(self.mean) < pixels.shape[1]:
            pixels = grey(pixels)
        pixels = ((pixels - self.mean) / self.std).contiguous(memory_format=self.memory_format)
        # In float32 like the other ranks' statistics; torch would send those of an empty batch in the autocast dtype.
        full_precision = torch.autocast(pixels.device.type, enabled=False) if empty else nullcontext()
        with torch.no_grad() if self.frozen else nullcontext(), self.statistics_guard(images), full_precision:
            return [features_of(encoded.zeros(count) if empty else encoded, images) for encoded in run(pixels)]

    def without_absent(self, images: Images) -> Tensor:
        """The pixels (B, C, H, W) with those of absent images replaced: their values, which may be NaN, must reach nothing, and in training
        batch statistics must be those of present images."""
        if self.training:
            return fill_absent(images.pixels, images.present)
        return images.pixels if images.all_present else torch.where(images.present[:, None, None, None], images.pixels, 0)

    def statistics_guard(self, images: Images) -> Any:
        """Freezes batch normalisation's running statistics for a training batch in which no sample has an image."""
        if not (self.training and self.has_batch_statistics) or torch.compiler.is_compiling():
            return nullcontext()
        anyone = bool(images.present.any()) if images.any_present is None else images.any_present
        return nullcontext() if anyone or self.has_synced_statistics else frozen_statistics(self.body)

    @property
    def has_synced_statistics(self) -> bool:
        """Whether trainer.sync_batchnorm computes its batch statistics over all ranks."""
        return self.has_batch_statistics and any(isinstance(m, nn.SyncBatchNorm) for m in self.body.modules())

    @torch.no_grad()
    def probe(self, run: Callable[[Images], Features | list[Features]]) -> list[Features]:
        """Returns the features of the smallest input, in eval mode."""
        training = self.training
        self.eval()
        features = run(self.example())
        self.train(training)
        return [features] if isinstance(features, Features) else features

    @contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Raises any exception of the model's own code as a UserError."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{self.library}'{self.name}' {what} ({type(error).__name__}: {shorten(first_line(error), 160)})") from error


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Context with batch normalisation in eval mode."""
    layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    for m in layers:
        m.eval()
    try:
        yield
    finally:
        for m in layers:
            m.train()


def check_data_config(data_config: Mapping[str, Any] | None, known: Sequence[str]) -> dict[str, Any]:
    """Raises UserError for a key that is not known."""
    for key in data_config or {}:
        if key not in known:
            raise UserError(f"image encoder: data_config has no '{key}'. {nearest(key, known)}")
    return dict(data_config or {})


def grey(pixels: Tensor) -> Tensor:
    """The luma (B, 1, H, W) of RGB pixels, by ITU-R BT.601."""
    red, green, blue = pixels.unbind(dim=1)
    return (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]


def of_channels(key: str, values: Any, channels: int) -> list[float]:
    """One constant per channel: as given, one for all, or for greyscale the mean of those of RGB."""
    given = list(values) if isinstance(values, list | tuple) else [values]
    if not all(type(value) in (int, float) for value in given):
        raise UserError(f"image encoder: data_config.{key} is {values!r}; expected a number for each of {channels} channels")
    if len(given) not in (1, channels, 3 if channels == 1 else 1):
        raise UserError(f"image encoder: data_config.{key} has {len(given)} values; expected one for each of {channels} channels")
    return given if len(given) == channels else given * channels if len(given) == 1 else [sum(given) / len(given)]


def height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    """
    >>> height_and_width(64), height_and_width([64, 256])
    ((64, 64), (64, 256))
    """
    sides = [size, size] if isinstance(size, int) else list(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(f"image encoder: image_size is {size}; expected a side in pixels, or [height, width]")
    return sides[0], sides[1]


def features_of(encoded: Encoded, images: Images) -> Features:
    """Features of the samples from encoded distinct images; images of several samples stay shared, unless a sample has several images."""
    if images.image_mask is not None:
        return features_of_several(encoded, images)
    mask = images.present[:, None].expand(-1, encoded.tokens.shape[1])
    return Features(encoded.tokens, mask, encoded.pooled, images.image_index, images.all_present)


def features_of_several(encoded: Encoded, images: Images) -> Features:
    """Concatenates the tokens of each sample's images to (B, P * N, D), after adding the image's position, and averages their pooled
    features."""
    shown, picture = images.image_mask, images.image_index
    assert shown is not None
    assert picture is not None
    (count, positions), (_, patches, dim) = shown.shape, encoded.tokens.shape
    tokens = encoded.tokens.index_select(0, picture.flatten()).view(count, positions, patches, dim)
    tokens = tokens + image_positions(positions, dim, tokens.device).to(tokens.dtype)[:, None]
    pooled = masked_mean(encoded.pooled.index_select(0, picture.flatten()).view(count, positions, -1), shown)
    mask = shown[:, :, None].expand(-1, -1, patches).flatten(1)
    return Features(tokens.flatten(1, 2), mask, pooled, full=images.all_present)


def image_positions(count: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Cosine position embeddings (P, D) that distinguish the tokens of a sample's first image from the second's; zero for the first.

    >>> image_positions(2, 4)[0].tolist()
    [0.0, 0.0, 0.0, 0.0]
    """
    frequencies = torch.logspace(0, -2, dim, device=device)
    return torch.cos(torch.arange(count, device=device)[:, None] * frequencies) - 1
