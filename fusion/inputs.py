"""Batched inputs of the encoders; `present` (B,) bool is True for the samples that have the input."""

from typing import NamedTuple

from torch import Tensor


class Images(NamedTuple):
    """A batch of images: pixels (B, 3, H, W) in RGB, or of as many channels as the encoder reads, uint8 in 0..255 or float in 0..1; present
    (B,) bool, False for a sample without image.

    With `image_index` (B,) int64, pixels (U, 3, H, W) holds only the distinct images, and sample b has the one at image_index[b]: an
    image that several samples share is encoded once.

    With `image_mask` (B, P) bool, a sample has up to P images, those at image_index (B, P) where `image_mask` is True; each contributes
    tokens of its own.

    any_present, all_present: whether any sample has an image, and whether all have one (or all P); None if unknown without a device
    synchronisation.
    """

    pixels: Tensor
    present: Tensor
    image_index: Tensor | None = None
    any_present: bool | None = None
    all_present: bool | None = None
    image_mask: Tensor | None = None


class Mixture(NamedTuple):
    """How the samples of a batch are mixed with one another, for all inputs and the target together: sample b becomes `weight` times sample
    b plus (1 - weight) times sample partner[b]. partner (B,) int64; partner[b] = b leaves it unmixed. weight () float, between 0 and 1.
    """

    partner: Tensor
    weight: Tensor


class Texts(NamedTuple):
    """A batch of texts: ids (B, N) int64; mask (B, N) bool, True for real tokens, all False where a sample has no text.

    full: True if every token is known to be real without a device synchronisation; attention then uses no mask.

    mixture: how the samples' word embeddings are to be mixed; ids and mask are those before. None: they aren't.
    """

    ids: Tensor
    mask: Tensor
    full: bool | None = None
    mixture: Mixture | None = None

    @property
    def present(self) -> Tensor:
        """(B,) bool: which samples have a text."""
        return self.mask.any(dim=1)


class Columns(NamedTuple):
    """A batch of table rows: numbers (B, F) float, scaled; categories (B, G) int64, 0 for an unknown one; mask (B, F + G) bool,
    numbers first, False where a cell is missing.

    full: True if no cell is missing, where that is known without a device synchronisation.

    mixture: how the embeddings of the samples' cells are to be mixed; numbers, categories and mask are those before. None: they aren't.
    """

    numbers: Tensor
    categories: Tensor
    mask: Tensor
    full: bool | None = None
    mixture: Mixture | None = None

    @property
    def present(self) -> Tensor:
        """(B,) bool: which samples have any cell."""
        return self.mask.any(dim=1)
