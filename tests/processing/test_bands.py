"""Images of other than three channels: what is read, from which files, and which are rejected."""

import struct
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from fusion.processing.bands import decode_bands
from fusion.processing.images import ImageError, ImageSpec, decode, load_image


def array(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, 256, shape).astype(dtype)


def bytes_of(image, form="PNG", **options):
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def saved(pixels):
    file = BytesIO()
    np.save(file, pixels)
    return file.getvalue()


def as_array(bands):
    return np.stack([np.asarray(band) for band in bands], axis=-1)


@pytest.mark.parametrize("channels", [2, 4, 5, 12])
def test_an_array_is_read_from_a_file_from_bytes_and_as_it_is(channels, tmp_path):
    pixels = array(6, 9, channels)
    np.save(tmp_path / "a.npy", pixels)
    for source in (tmp_path / "a.npy", str(tmp_path / "a.npy"), saved(pixels), pixels, np.asfortranarray(pixels)):
        assert np.array_equal(as_array(decode_bands(source, channels)), pixels)


def test_numbers_of_other_types_are_scaled_as_in_images_of_three_channels():
    pixels = array(6, 9, 4)
    for other in (pixels.astype(np.uint16) * 257, pixels / 255, (pixels / 255).astype(np.float32)):
        assert np.array_equal(as_array(decode_bands(saved(other), 4)), pixels)


def test_an_image_file_with_alpha_has_four_channels_of_which_none_is_multiplied():
    pixels = array(6, 9, 4)
    image = Image.fromarray(pixels)
    for source in (image, bytes_of(image), bytes_of(image, "TIFF"), bytes_of(image, "WEBP", lossless=True, exact=True)):
        assert np.array_equal(as_array(decode_bands(source, 4)), pixels)
    palette = Image.new("P", (9, 6), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert as_array(decode_bands(bytes_of(palette, transparency=1), 4))[0, 0].tolist() == [10, 20, 30, 0]
    assert as_array(decode_bands(bytes_of(image.convert("LA")), 2)).shape == (6, 9, 2)


def test_every_channel_is_turned_upright():
    pixels = array(6, 9, 4)
    exif = Image.Exif()
    exif[0x0112] = 6
    found = as_array(decode_bands(bytes_of(Image.fromarray(pixels), exif=exif), 4))
    assert np.array_equal(found, np.rot90(pixels, -1))


def test_one_channel_is_greyscale_of_any_image():
    image = Image.fromarray(array(6, 9, 3))
    for source in (image, bytes_of(image), np.asarray(image), saved(np.asarray(image))):
        assert np.array_equal(as_array(decode_bands(source, 1))[..., 0], np.asarray(image.convert("L")))


def test_three_channels_are_read_from_arrays_in_files_too():
    pixels = array(6, 9, 3)
    assert np.array_equal(np.asarray(decode(saved(pixels))), pixels)
    assert np.array_equal(np.asarray(decode(saved(pixels[..., 0]))), np.repeat(pixels[..., :1], 3, axis=2))


@pytest.mark.parametrize("how", ["squash", "crop", "pad"])
def test_each_channel_is_resized_as_one_of_rgb(how):
    pixels = array(30, 47, 6)
    found = load_image(saved(pixels), ImageSpec((16, 16), how, channels=6))
    expected = [load_image(np.ascontiguousarray(pixels[..., i : i + 3]), ImageSpec((16, 16), how)) for i in (0, 3)]
    assert found.shape == (6, 16, 16)
    assert np.array_equal(found, np.concatenate(expected))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (bytes_of(Image.fromarray(array(6, 9, 3))), r"3 channels \(RGB\), expected 4"),
        (bytes_of(Image.fromarray(array(6, 9, 3)), "JPEG"), r"3 channels \(RGB\), expected 4"),
        (bytes_of(Image.new("CMYK", (9, 6)), "JPEG"), r"4 channels \(CMYK\), expected 4"),
        (saved(array(6, 9, 5)), r"an array \(6, 9, 5\), expected \(H, W, 4\) of uint8"),
        (saved(array(6, 9)), r"an array \(6, 9\), expected \(H, W, 4\)"),
        (array(4, 6, 9), r"an array \(4, 6, 9\), expected \(H, W, 4\)"),
        (saved(array(6, 9, 4, dtype=np.int64)), r"an array of int64, expected \(H, W, 4\) of uint8"),
        (saved(np.full((6, 9, 4), 2.0)), "an array of floats from 2 to 2"),
        (saved(array(6, 9, 4))[:-20], "truncated|corrupt"),
        (saved(array(6, 9, 4))[:30], "truncated|corrupt"),
        (saved(np.zeros((6, 9, 4), dtype=object)), "corrupt: Object arrays"),
        (saved(array(2000, 2000, 4)), "4.0 megapixels, limit 3"),
        (b"", "empty file"),
        (b"nothing", "not an image"),
        (7, "expected a path, bytes, a Pillow image or a NumPy array, got int"),
    ],
)
def test_other_files_are_rejected_with_the_reason(source, reason):
    with pytest.raises(ImageError, match=reason):
        decode_bands(source, 4, max_megapixels=3)


def tiff_of(pixels):
    """An uncompressed TIFF of any number of channels, of which those after the third are extra samples."""
    height, width, channels = pixels.shape
    data = pixels.tobytes()
    after = 8 + len(data)
    bits, extra = struct.pack(f"<{channels}H", *[8] * channels), struct.pack(f"<{channels - 3}H", *[0] * (channels - 3))
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, channels, after), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 8)]
    tags += [(277, 3, 1, channels), (278, 4, 1, height), (279, 4, 1, len(data)), (284, 3, 1, 1), (338, 3, channels - 3, after + len(bits))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return struct.pack("<2sHI", b"II", 42, after + len(bits) + len(extra)) + data + bits + extra + directory


@pytest.mark.parametrize("channels", [4, 6])
def test_a_tiff_of_more_channels_than_pillow_reads_is_rejected_and_not_cut(channels):
    tiff = tiff_of(array(6, 9, 6))
    with pytest.raises(ImageError, match=rf"6 channels, of which \d can be read; expected an array \(H, W, {channels}\) in a .npy file"):
        decode_bands(tiff, channels)
