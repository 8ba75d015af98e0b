"""What encoders take: batches of inputs, each of which says by `present` (B,) bool which samples have it."""

from typing import NamedTuple

from torch import Tensor


class Images(NamedTuple):
    """A batch of images, RGB: pixels (B, 3, H, W), uint8 in 0..255 or float in 0..1; present (B,) bool, False where a sample has none.

    With `picture` (B,) int64, pixels (U, 3, H, W) holds the distinct pictures only, of which sample b shows the one at picture[b]: where
    several samples ask about one picture, it is encoded once.

    anyone, everyone: whether any sample has an image, and whether all have one, where that is known without asking the device.
    """

    pixels: Tensor
    present: Tensor
    picture: Tensor | None = None
    anyone: bool | None = None
    everyone: bool | None = None


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
