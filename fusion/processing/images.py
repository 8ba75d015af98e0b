"""Image decoding: RGB and upright, as a viewer would show the image; and resizing to one size."""

import os
import stat
import struct
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from math import inf, prod
from pathlib import Path
from typing import IO, Literal, TypeAlias

import numpy as np
from numpy.lib import format as npy
from PIL import Image, ImageFile

from fusion.errors import UserError, nearest

Source: TypeAlias = str | Path | bytes | Image.Image | np.ndarray
FileOrBytes: TypeAlias = str | bytes
Resize: TypeAlias = Literal["squash", "crop", "pad"]
Interpolation: TypeAlias = Literal["bicubic", "bilinear", "nearest"]
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR, "nearest": Image.Resampling.NEAREST}
ORIENTATION = 0x0112  # the EXIF tag; below, the transposition that undoes each of its values
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
NUMBERS = "uint8, uint16, or floats in 0..1"
RGB_ARRAY = "expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
MAX_SIDE = 65_535  # pixels, of a JPEG; resizing keeps coefficients for each pixel of a side
START_OF_SCAN, MAX_SCANS = b"\xff\xda", 100  # of a JPEG; libtiff has the same limit
NUMPY = b"\x93NUMPY"  # how a .npy file begins


def cores() -> int:
    """Number of cores that this process may use: a job's share of its machine, where the system reports it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ImageError(UserError):
    """The reason why an image can't be used, in a few words: "missing", "truncated", "not an image", "400.0 megapixels, limit 100"."""


@dataclass(frozen=True)
class ImageSpec:
    """How images are resized to one size (height, width). channels: 3 for RGB, 1 for greyscale, others as they are stored."""

    size: tuple[int, int]
    resize: Resize = "squash"
    interpolation: Interpolation = "bicubic"
    max_megapixels: float = 100.0
    channels: int = 3


def load_image(source: Source, spec: ImageSpec) -> np.ndarray:
    """One image as uint8 (C, H, W). Raises ImageError with the reason."""
    if spec.channels != 3:
        from fusion.processing.bands import decode_bands  # which is built on this module

        bands = decode_bands(source, spec.channels, max_megapixels=spec.max_megapixels)
        return np.concatenate([resize(band, spec.size, spec.resize, interpolation=spec.interpolation) for band in bands])
    image = decode(source, max_megapixels=spec.max_megapixels, at_least=spec.size)
    return resize(image, spec.size, spec.resize, interpolation=spec.interpolation)


def decoded(sources: Sequence[Source | None], spec: ImageSpec) -> list[np.ndarray | ImageError | None]:
    """Each image as uint8 (C, H, W), or the error; files are decoded on all cores, since Pillow releases the GIL."""

    def one(source: Source | None) -> np.ndarray | ImageError | None:
        try:
            return None if source is None else load_image(source, spec)
        except ImageError as error:
            return error

    files = all(isinstance(source, str | Path | bytes | None) for source in sources)  # others may be the same object twice
    if not files or len(sources) < 2:
        return [one(source) for source in sources]
    with ThreadPoolExecutor(max_workers=min(32, cores())) as pool:
        return list(pool.map(one, sources))


def decode(source: Source, *, max_megapixels: float = 100, at_least: tuple[int, int] | None = None) -> Image.Image:
    """The image in RGB, as a viewer shows it: upright by its EXIF orientation, transparency over white, the first of several frames.

    source: a file (of an image, or a .npy with an array), its bytes, a Pillow image, or an array (H, W), (H, W, 1), (H, W, 3) or
    (H, W, 4) of uint8, uint16, or floats in 0..1.
    max_megapixels: a larger image is rejected by its header, before it is decoded. at_least: (height, width) that is needed; a large JPEG
    is then decoded at 1/2, 1/4 or 1/8 of its size, which is faster, but never below this size.

    16 bits are scaled to 8 by their full range, as are integers (mode I) above 255; floats (mode F) are scaled from 0..1, 0..255 or
    0..65535, the smallest range that contains them. Values that are negative or larger are scaled from their minimum to their maximum.

    Raises ImageError with the reason.

    >>> decode(np.zeros((2, 3), dtype=np.uint8)).size
    (3, 2)
    >>> decode("nowhere.png")
    Traceback (most recent call last):
    fusion.processing.images.ImageError: missing
    """
    if isinstance(source, np.ndarray):
        reject_size(source.shape[1::-1], max_megapixels)
        return in_rgb(from_array(source))
    if isinstance(source, Image.Image):
        reject_size(source.size, max_megapixels)
        return upright_rgb(source)
    if isinstance(source, str | Path):
        with opened_file(source) as file:
            return from_file(file, max_megapixels, at_least)
    if isinstance(source, bytes):
        if not source:
            raise ImageError("empty file")
        return from_file(BytesIO(source), max_megapixels, at_least)
    raise ImageError(f"expected a path, bytes, a Pillow image or a NumPy array, got {type(source).__name__}")


def resize(
    image: Image.Image,
    size: tuple[int, int],
    how: Resize,
    *,
    interpolation: Interpolation = "bicubic",
    fill: int = 128,
) -> np.ndarray:
    """An RGB image at `size` (height, width), as uint8 (3, H, W); one of mode L as (1, H, W).

    how: "squash" both sides to the size; "crop" the centre of the image with its shorter side at the size; "pad" the image, centred, with
    its longer side at the size and the grey `fill` around it. "bicubic" and "bilinear" are antialiased.

    >>> resize(Image.new("RGB", (40, 20), "red"), (8, 8), "pad")[0, :, 0].tolist()
    [128, 128, 255, 255, 255, 255, 128, 128]
    """
    if interpolation not in FILTERS:
        raise UserError(f"interpolation '{interpolation}' is unknown. {nearest(interpolation, FILTERS)}")
    kernel = FILTERS[interpolation]
    (height, width), (image_width, image_height) = size, image.size
    if how == "squash":
        fitted = image if image.size == (width, height) else image.resize((width, height), kernel)
    elif how == "crop":
        fitted = image.resize((width, height), kernel, box=centre(image.size, (width, height)))
    elif how == "pad":
        scale = min(width / image_width, height / image_height)
        inner = max(round(image_width * scale), 1), max(round(image_height * scale), 1)
        fitted = Image.new(image.mode, (width, height), fill if image.mode == "L" else (fill, fill, fill))
        fitted.paste(image.resize(inner, kernel), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    else:
        raise UserError(f"resize '{how}' is unknown. {nearest(how, ('squash', 'crop', 'pad'))}")
    # A copy, because Pillow's memory is read-only, and torch warns about tensors that share it.
    return np.array(np.atleast_3d(np.asarray(fitted)).transpose(2, 0, 1), order="C", copy=True)


def centre(image: tuple[int, int], target: tuple[int, int]) -> tuple[float, float, float, float]:
    """The box of an image that a centre crop shows, in the image's own pixels, so that only this part is resized. As in torchvision and
    transformers, the crop begins at a whole pixel of the resized image, whose longer side is rounded down.

    image, target: (width, height).

    >>> centre((20, 10), (5, 5))  # resized to 10 x 5 pixels, of which it shows the third to the seventh
    (4.0, 0.0, 14.0, 10.0)
    """
    (image_width, image_height), (width, height) = image, target
    wide = image_width * height >= image_height * width
    whole_width, whole_height = (image_width * height // image_height, height) if wide else (width, image_height * width // image_width)
    left, top = (whole_width - width) // 2, (whole_height - height) // 2
    across, down = image_width / whole_width, image_height / whole_height
    right, bottom = min((left + width) * across, image_width), min((top + height) * down, image_height)
    return left * across, top * down, right, bottom


# Decoding files


def opened_file(path: str | Path) -> IO[bytes]:
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode) and status.st_size:
            return open(path, "rb")
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last for a NUL in the path
        raise ImageError("missing") from None
    except PermissionError:
        raise ImageError("permission denied") from None
    except OSError as error:
        raise ImageError(error.strerror or str(error)) from error
    raise ImageError("empty file" if stat.S_ISREG(status.st_mode) else "a folder" if stat.S_ISDIR(status.st_mode) else "not a file")


def from_file(file: IO[bytes], max_megapixels: float, at_least: tuple[int, int] | None) -> Image.Image:
    if is_array(file):
        return in_rgb(from_array(read_array(file, max_megapixels, (1, 3, 4), RGB_ARRAY)))
    image = opened_image(file)
    reject_size(image.size, max_megapixels)
    if at_least is not None:
        height, width = at_least if orientation(image) < 5 else at_least[::-1]
        image.draft(None, (max(width, 1), max(height, 1)))
    if hasattr(image, "_tile_size") and prod(image.size) > (Image.MAX_IMAGE_PIXELS or inf):
        image.im = Image.core.new(image.mode, image._tile_size)  # a large TIFF would warn again when it allocates; so allocate first
    return upright_rgb(image)


def opened_image(file: IO[bytes]) -> ImageFile.ImageFile:
    """Image.open without its limit on pixels, since max_megapixels is checked instead: Pillow's limit is global to the process, and its
    warning can't be silenced in one thread only. EPS is excluded: it is a program, which Pillow would run by Ghostscript; and IPTC, which
    may contain an EPS, or an image of any size."""
    prefix = file.read(16)
    tried = {"EPS", "IPTC"}
    recognised = False
    for load_plugins in (Image.preinit, Image.init):  # the common formats first, then all
        load_plugins()
        for name in [name for name in Image.ID if name not in tried]:
            tried.add(name)
            factory, accept = Image.OPEN[name]
            try:
                accepted = accept is None or accept(prefix)
                if accepted and not isinstance(accepted, str):  # a string is a message about a missing library
                    file.seek(0)
                    return with_few_scans(factory(file, ""), file)
            except (SyntaxError, IndexError, TypeError, struct.error):  # plugins raise these for files of another format
                recognised = recognised or accept is not None
            except (MemoryError, ImageError):
                raise
            except Exception as error:
                raise ImageError(reason_of(error)) from error
    raise ImageError("corrupt header" if recognised else "not an image")


def with_few_scans(image: ImageFile.ImageFile, file: IO[bytes]) -> ImageFile.ImageFile:
    """Raises ImageError for a JPEG of so many scans that a small file would take minutes to decode. Encoders write about ten."""
    if image.format in ("JPEG", "MPO"):
        position = file.tell()
        file.seek(0)
        scans = file.read().count(START_OF_SCAN)
        file.seek(position)
        if scans > MAX_SCANS:
            raise ImageError(f"{scans:,} scans, limit {MAX_SCANS}")
    return image


def upright_rgb(image: Image.Image) -> Image.Image:
    try:
        image.load()
        # Read after loading, when Pillow has already rotated a TIFF and removed the tag.
        turn = UPRIGHT.get(orientation(image))
        rgb = in_rgb(image)
    except (MemoryError, ImageError):
        raise
    except Exception as error:  # plugins raise exceptions of any type
        raise ImageError(reason_of(error)) from error
    if turn is None:
        return rgb
    turned = rgb.transpose(turn)
    turned.info.clear()  # it has the EXIF tag, by which the image would be rotated again when decoded again
    return turned


def orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # corrupt EXIF: viewers show the image unrotated
        return 1


def reason_of(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return "more megapixels than Pillow allows in this format"
    message = " ".join(str(error).split())
    if isinstance(error, EOFError) or "truncated" in message.lower():
        return "truncated"
    return f"corrupt: {message or type(error).__name__}"


def reject_size(size: tuple[int, ...], max_megapixels: float) -> None:
    megapixels = prod(size) / 1e6
    if not megapixels:
        raise ImageError("no pixels")
    if megapixels > max_megapixels:
        raise ImageError(f"{megapixels:.1f} megapixels, limit {max_megapixels:g}")
    if max(size) > MAX_SIDE:
        raise ImageError(f"{' x '.join(map(str, size))} pixels, limit {MAX_SIDE:,} a side")


# Conversion to RGB


def in_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return from_numbers(np.asarray(image), image.info.get("transparency"))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def from_numbers(numbers: np.ndarray, transparent: object) -> Image.Image:
    grey = in_8_bits(numbers, *black_and_white(numbers))
    if isinstance(transparent, int):
        grey[numbers == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def black_and_white(numbers: np.ndarray) -> tuple[float, float]:
    """The values that become black and white."""
    if numbers.dtype.itemsize == 2:
        return 0, 65535
    finite = numbers[np.isfinite(numbers)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    whites = (1, 255, 65535) if numbers.dtype.kind == "f" else (255, 65535)
    return (low, high) if low < 0 or high > 65535 else (0, next(white for white in whites if high <= white))


def in_8_bits(numbers: np.ndarray, black: float, white: float) -> np.ndarray:
    numbers = numbers.astype(np.float32)
    if not np.isfinite(numbers).all():
        numbers = np.nan_to_num(numbers, nan=black, posinf=white, neginf=black)
    return np.rint((numbers - black) * (255 / ((white - black) or 1))).astype(np.uint8)


def from_array(array: np.ndarray) -> Image.Image:
    check_shape(array.shape, (1, 3, 4), RGB_ARRAY)
    pixels = as_bytes(array, RGB_ARRAY)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


def check_shape(shape: tuple[int, ...], channels: Collection[int], expected: str) -> None:
    if not prod(shape) or len(shape) not in (2, 3) or (shape[2] if len(shape) == 3 else 1) not in channels:
        raise ImageError(f"an array {shape}, {expected} of {NUMBERS}")


def as_bytes(array: np.ndarray, expected: str) -> np.ndarray:
    """An array of any accepted numbers as uint8. expected: its shapes, for the error."""
    is_float = array.dtype.kind == "f"
    if not (is_float or array.dtype in (np.uint8, np.uint16)):
        raise ImageError(f"an array of {array.dtype}, {expected} of {NUMBERS}")
    if is_float and not (array.min() >= 0 and array.max() <= 1):  # not (NaN >= 0)
        raise ImageError(f"an array of floats from {array.min():g} to {array.max():g}, {expected} of {NUMBERS}")
    return array if array.dtype == np.uint8 else in_8_bits(array, 0, 1 if is_float else 65535)


def is_array(file: IO[bytes]) -> bool:
    """Whether a file has an array, as numpy.save writes it."""
    file.seek(0)
    prefix = file.read(len(NUMPY))
    file.seek(0)
    return prefix == NUMPY


def read_array(file: IO[bytes], max_megapixels: float, channels: Collection[int], expected: str) -> np.ndarray:
    """The array of a file; its header is checked before it is read."""
    try:
        read_header = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
        shape = read_header(file)[0]
        reject_size(shape[1::-1], max_megapixels)
        check_shape(shape, channels, expected)
        file.seek(0)
        return np.load(file, allow_pickle=False)
    except ImageError:
        raise
    except Exception as error:  # NumPy raises errors of many types for corrupt headers
        raise ImageError(reason_of(error)) from error
