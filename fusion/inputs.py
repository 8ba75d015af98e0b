"""What encoders take: batches of inputs, each of which says by `present` (B,) bool which samples have it."""

from typing import NamedTuple

from torch import Tensor


class Images(NamedTuple):
    """A batch of images, RGB: pixels (B, 3, H, W), uint8 in 0..255 or float in 0..1; present (B,) bool, False where a sample has none.

    With `picture` (B,) int64, pixels (U, 3, H, W) holds the distinct pictures only, of which sample b shows the one at picture[b]: where
    several samples ask about one picture, it is encoded once.

    With `shown` (B, P) bool, a sample has up to P pictures, those at picture (B, P) where it is True; each is attended to as its own
    tokens.

    anyone, everyone: whether any sample has an image, and whether all have one (or all P), where that is known without asking the device.
    """

    pixels: Tensor
    present: Tensor
    picture: Tensor | None = None
    anyone: bool | None = None
    everyone: bool | None = None
    shown: Tensor | None = None


class Texts(NamedTuple):
    """A batch of texts: ids (B, N) int64; mask (B, N) bool, True for real tokens, all False where a sample has no text.

    full: True where every token is known to be real, without asking the device: attention then needs no mask.
    """

    ids: Tensor
    mask: Tensor
    full: bool | None = None

    @property
    def present(self) -> Tensor:
        """(B,) bool: which samples have a text."""
        return self.mask.any(dim=1)


class Columns(NamedTuple):
    """A batch of rows of a table: numbers (B, F) float, scaled; categories (B, G) int64, 0 for one that is not known; mask (B, F + G) bool,
    numbers first, False where a cell is missing.

    full: True where no cell is known to be missing, without asking the device.
    """

    numbers: Tensor
    categories: Tensor
    mask: Tensor
    full: bool | None = None

    @property
    def present(self) -> Tensor:
        """(B,) bool: which samples have any cell."""
        return self.mask.any(dim=1)
