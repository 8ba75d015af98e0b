"""Images of other than three channels: each channel as it is stored."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from fusion.processing.images import (
    UPRIGHT,
    ImageError,
    Source,
    as_bytes,
    check_shape,
    decode,
    is_array,
    opened_file,
    opened_image,
    orientation,
    read_array,
    reason_of,
    reject_size,
)

MODES = {2: ("LA",), 4: ("RGBA", "RGBX")}  # of Pillow, whose bands are the channels
SAMPLES_PER_PIXEL = 277  # the TIFF tag


def decode_bands(source: Source, channels: int, *, max_megapixels: float = 100) -> list[Image.Image]:
    """The channels of an image, each of mode L and upright by its EXIF orientation; the first of several frames.

    channels: 1 is greyscale, converted from any image that `decode` reads. 4 is RGBA of an image file, where alpha is a channel like the
    others; any number is that of an array (H, W, C), in a .npy file or not, of uint8, uint16, or floats in 0..1.

    Raises ImageError with the reason; also for another number of channels.

    >>> [band.getpixel((0, 0)) for band in decode_bands(Image.new("RGBA", (2, 2), (1, 2, 3, 4)), 4)]
    [1, 2, 3, 4]
    """
    if channels == 1:
        return [decode(source, max_megapixels=max_megapixels).convert("L")]
    expected = f"expected (H, W, {channels})"
    if isinstance(source, np.ndarray):
        reject_size(source.shape[1::-1], max_megapixels)
        return of_array(source, channels, expected)
    if isinstance(source, Image.Image):
        reject_size(source.size, max_megapixels)
        return of_image(source, channels)
    if not isinstance(source, str | Path | bytes):
        raise ImageError(f"expected a path, bytes, a Pillow image or a NumPy array, got {type(source).__name__}")
    if source == b"":
        raise ImageError("empty file")
    with BytesIO(source) if isinstance(source, bytes) else opened_file(source) as file:
        if is_array(file):
            return of_array(read_array(file, max_megapixels, (channels,), expected), channels, expected)
        image = opened_image(file)
        reject_size(image.size, max_megapixels)
        return of_image(image, channels)


def of_array(array: np.ndarray, channels: int, expected: str) -> list[Image.Image]:
    check_shape(array.shape, (channels,), expected)
    return [Image.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(as_bytes(array, expected), 2, 0)]


def of_image(image: Image.Image, channels: int) -> list[Image.Image]:
    stored = getattr(image, "tag_v2", {}).get(SAMPLES_PER_PIXEL, 1)
    try:
        image.load()
        turn = UPRIGHT.get(orientation(image))  # read after loading, as in `decode`
        if channels == 4 and image.has_transparency_data and image.mode != "RGBA":
            image = image.convert("RGBA")  # of a palette, or grey
        bands = image.split()
    except MemoryError:
        raise
    except Exception as error:  # plugins raise exceptions of any type
        raise ImageError(reason_of(error)) from error
    if stored > len(bands):
        raise ImageError(f"{stored} channels, of which {len(bands)} can be read; expected an array (H, W, {channels}) in a .npy file")
    if image.mode not in MODES.get(channels, ()):
        raise ImageError(f"{len(bands)} channels ({image.mode}), expected {channels}")
    return [band if turn is None else band.transpose(turn) for band in bands]
