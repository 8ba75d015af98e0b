"""Images of every kind, decoded as a viewer shows them, and brought to one size."""

import io
import os
import struct
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from torch.nn.functional import interpolate

from fusion.errors import UserError
from fusion.processing import images as images_module
from fusion.processing.images import ImageError, decode, resize

RANDOM = np.random.default_rng(0)


def noise(height, width, channels=3, dtype=np.uint8):
    shape = (height, width, channels) if channels else (height, width)
    return RANDOM.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def smooth(height, width):
    """Colours that JPEG keeps nearly as they are."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x / width, 255 * y / height, 255 * (x + y) / (width + height)], -1).astype(np.uint8)


def saved(image, form, **options):
    memory = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(memory, form, **options)
    return memory.getvalue()


def seen(source, **options):
    picture = decode(source, **options)
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


def over_white(colours, alpha):
    """Alpha (0..255) composited on white, in real numbers."""
    alpha = np.asarray(alpha, dtype=float)[..., None] / 255
    return np.asarray(colours, dtype=float) * alpha + 255 * (1 - alpha)


def refusal(source, **options):
    with pytest.raises(ImageError) as caught:
        decode(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def png_header(width, height):
    """A PNG that says how large it is, and has no pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"\0\0\0\x10IDAT" + b"\0" * 16


# Where an image comes from.


def test_a_path_its_bytes_a_picture_and_an_array_give_the_same_pixels(tmp_path):
    pixels = noise(7, 5)
    (tmp_path / "a.png").write_bytes(saved(pixels, "PNG"))
    for source in (str(tmp_path / "a.png"), tmp_path / "a.png", saved(pixels, "PNG"), Image.fromarray(pixels), pixels):
        assert np.array_equal(seen(source), pixels)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "TGA"])
def test_lossless_formats_are_read_exactly_whatever_the_file_is_called(tmp_path, form):
    (tmp_path / "picture.jpg").write_bytes(saved(noise(9, 4), form))
    assert np.array_equal(seen(tmp_path / "picture.jpg"), np.asarray(Image.open(tmp_path / "picture.jpg").convert("RGB")))


def test_a_file_is_closed_when_its_picture_is_there(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(saved(noise(5, 5), "PNG"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        for i in range(3):
            decode(tmp_path / f"{i}.png")
            os.unlink(tmp_path / f"{i}.png")


# Upright.


def turned(upright, orientation):
    """How the EXIF standard has an upright picture stored: which of its sides the first row and the first column show."""
    return {
        1: upright,
        2: np.fliplr(upright),  # first row top, first column right
        3: np.rot90(upright, 2),  # bottom, right
        4: np.flipud(upright),  # bottom, left
        5: np.swapaxes(upright, 0, 1),  # left, top
        6: np.rot90(upright, 1),  # right, top
        7: np.swapaxes(np.rot90(upright, 2), 0, 1),  # right, bottom
        8: np.rot90(upright, -1),  # left, bottom
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("form", "options"), [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})]
)
def test_every_exif_orientation_is_shown_upright(orientation, form, options):
    upright = noise(6, 4)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = saved(np.ascontiguousarray(turned(upright, orientation)), form, exif=exif, **options)
    assert np.array_equal(seen(stored), upright)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_decoded_at_a_part_of_its_size_is_upright_too_and_no_smaller_than_asked(orientation):
    upright = smooth(160, 330)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = saved(np.ascontiguousarray(turned(upright, orientation)), "JPEG", quality=95, exif=exif)
    assert np.abs(seen(stored) - upright).max() < 12
    small = seen(stored, at_least=(40, 80))
    assert small.shape == (40, 83, 3)
    assert np.abs(small[::13, ::27] - upright[2::52, 2::108]).max() < 16


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_what_is_upright_is_not_turned_again_when_it_is_decoded_again(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    once = decode(saved(smooth(6, 4), form, exif=exif))
    assert np.array_equal(seen(once), np.asarray(once))


def test_a_picture_in_memory_is_turned_by_its_exif_and_left_as_it_was():
    picture = Image.fromarray(noise(4, 6))
    picture.getexif()[0x0112] = 6
    before = np.asarray(picture).copy()
    assert np.array_equal(seen(picture), np.rot90(before, -1))
    assert np.array_equal(np.asarray(picture), before)


@pytest.mark.parametrize(
    "exif",
    [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0", b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0"],
)
def test_damaged_exif_does_not_cost_the_picture(exif):
    pixels = smooth(16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow says that the EXIF is corrupt
        assert seen(saved(pixels, "JPEG", exif=exif)).shape == pixels.shape
        assert np.array_equal(seen(saved(pixels, "PNG", exif=exif)), pixels)


# Transparency.


def test_alpha_is_composited_on_white():
    pixels = noise(8, 8, 4)
    expected = over_white(pixels[..., :3], pixels[..., 3])
    for source in (saved(pixels, "PNG"), saved(pixels, "WEBP", lossless=True, exact=True), pixels, Image.fromarray(pixels)):
        assert np.abs(seen(source) - expected).max() <= 1


def test_grey_with_alpha_is_composited_on_white():
    grey, alpha = noise(8, 8, 0), noise(8, 8, 0)
    picture = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    expected = over_white(np.repeat(grey[..., None], 3, 2), alpha)
    assert np.abs(seen(saved(picture, "PNG")) - expected).max() <= 1
    assert np.abs(seen(picture.convert("La").convert("LA")) - expected).max() <= 255 / np.maximum(alpha, 1).min()


@pytest.mark.parametrize("form", ["PNG", None])
def test_a_palette_with_alpha_is_composited_on_white(form):
    colours, alpha, index = noise(1, 16)[0], noise(1, 16, 0)[0], RANDOM.integers(0, 16, (8, 8), dtype=np.uint8)
    picture = Image.fromarray(index)
    picture.putpalette(colours.tobytes())
    picture.info["transparency"] = alpha.tobytes()
    source = saved(picture, form, transparency=alpha.tobytes()) if form else picture
    assert np.abs(seen(source) - over_white(colours[index], alpha[index])).max() <= 1


def test_a_palette_picture_with_an_alpha_channel_is_composited_on_white():
    colours, index, alpha = noise(1, 16)[0], RANDOM.integers(0, 16, (8, 8), dtype=np.uint8), noise(8, 8, 0)
    palette = Image.fromarray(index)
    palette.putpalette(colours.tobytes())
    picture = palette.convert("PA")
    picture.putalpha(Image.fromarray(alpha))
    assert picture.mode == "PA"
    assert np.abs(seen(picture) - over_white(colours[index], alpha)).max() <= 1


def test_one_transparent_colour_turns_white_in_rgb_grey_and_palette():
    pixels = np.array([[[10, 20, 30], [40, 50, 60]]], dtype=np.uint8)
    assert seen(saved(pixels, "PNG", transparency=(10, 20, 30))).tolist() == [[[255, 255, 255], [40, 50, 60]]]
    grey = np.array([[7, 9]], dtype=np.uint8)
    assert seen(saved(grey, "PNG", transparency=7))[0, :, 0].tolist() == [255, 9]
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8))
    palette.putpalette(bytes([1, 2, 3, 4, 5, 6]))
    assert seen(saved(palette, "GIF", transparency=0)).tolist() == [[[255, 255, 255], [4, 5, 6]]]
    deep = np.array([[7, 257 * 9]], dtype=np.uint16)
    assert seen(saved(deep, "PNG", transparency=7))[0, :, 0].tolist() == [255, 9]


# Depths and colour spaces.


def test_grey_one_bit_and_palette_pictures_become_rgb():
    grey = noise(5, 5, 0)
    assert np.array_equal(seen(saved(grey, "PNG")), np.repeat(grey[..., None], 3, 2))
    bits = noise(5, 9, 0) > 127
    for form in ("PNG", "TIFF"):
        assert np.array_equal(seen(saved(Image.fromarray(bits), form))[..., 0], bits * 255)
    colours, index = noise(1, 16)[0], RANDOM.integers(0, 16, (8, 8), dtype=np.uint8)
    palette = Image.fromarray(index)
    palette.putpalette(colours.tobytes())
    assert np.array_equal(seen(saved(palette, "PNG")), colours[index])


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM", None])
def test_sixteen_bits_become_eight_by_their_full_range(form):
    deep = noise(16, 16, 0, np.uint16)
    deep[0, :4] = 0, 128, 129, 65535
    found = seen(saved(deep, form) if form else Image.fromarray(deep))
    assert np.array_equal(found, np.repeat(np.rint(deep / 257)[..., None], 3, 2))


def test_a_dark_sixteen_bit_picture_is_not_brightened():
    assert seen(saved(np.full((4, 4), 257, dtype=np.uint16), "PNG")).max() == 1


def test_the_order_of_bytes_makes_no_difference():
    deep = noise(6, 6, 0, np.uint16)
    big = Image.frombytes("I;16B", (6, 6), deep.astype(">u2").tobytes())
    assert np.array_equal(seen(big)[..., 0], np.rint(deep / 257))


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        (np.array([[0, 200, 255]], dtype=np.int32), [0, 200, 255]),
        (np.array([[0, 257 * 100, 65535]], dtype=np.int32), [0, 100, 255]),
        (np.array([[0, 257, 300]], dtype=np.int32), [0, 1, 1]),
        (np.array([[0, 500_000, 1_000_000]], dtype=np.int32), [0, 128, 255]),
        (np.array([[-100, 0, 100]], dtype=np.int32), [0, 128, 255]),
        (np.array([[0, 0.2, 1]], dtype=np.float32), [0, 51, 255]),
        (np.array([[0, 51, 255]], dtype=np.float32), [0, 51, 255]),
        (np.array([[0, 257 * 9, 65535]], dtype=np.float32), [0, 9, 255]),
        (np.array([[-1, 0.6, 1]], dtype=np.float32), [0, 204, 255]),
        (np.array([[0, 0, 0]], dtype=np.float32), [0, 0, 0]),
        (np.array([[np.nan, 0.2, np.inf]], dtype=np.float32), [0, 51, 51]),
    ],
)
def test_wide_numbers_are_scaled_and_never_clipped(numbers, expected):
    for source in (Image.fromarray(numbers), saved(numbers, "TIFF")):
        if not np.isfinite(numbers).all():
            expected = [0, 51, 255]  # infinite is as white as white is
        assert np.abs(seen(source)[0, :, 0] - expected).max() <= 1


def test_cmyk_is_ink_and_adobes_inverted_jpeg_is_not_shown_as_a_negative():
    ink = np.zeros((16, 64, 4), dtype=np.uint8)
    ink[:, :16] = 255, 0, 0, 0
    ink[:, 16:32] = 0, 255, 255, 0
    ink[:, 32:48] = 0, 0, 0, 255
    ink[:, 48:] = 60, 120, 30, 80
    expected = (255.0 - ink[..., :3]) * (255.0 - ink[..., 3:]) / 255
    picture = Image.frombytes("CMYK", (64, 16), ink.tobytes())
    jpeg = saved(picture, "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in jpeg  # whose ink is stored inverted
    assert np.abs(seen(picture) - expected).max() <= 2
    assert np.abs(seen(saved(picture, "TIFF")) - expected).max() <= 2
    assert np.abs(seen(jpeg)[:, 2::16] - expected[:, 2::16]).max() <= 6


def test_ycbcr_becomes_rgb():
    colours = np.array([[[255, 0, 0], [0, 128, 255], [90, 90, 90]]], dtype=np.uint8)
    matrix = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
    ycbcr = np.clip(np.rint(colours @ matrix.T + [0, 128, 128]), 0, 255).astype(np.uint8)
    assert np.abs(seen(Image.frombytes("YCbCr", (3, 1), ycbcr.tobytes())) - colours).max() <= 2


def test_lab_becomes_rgb():
    # CIE L*a*b* (D50) of white, black and sRGB red; a and b are signed bytes.
    lab = np.array([[255, 0, 0], [0, 0, 0], [round(54.3 * 2.55), 81, 70]]).astype(np.int16).astype(np.uint8)
    try:
        ImageCms.createProfile("LAB")
    except ImportError:
        pytest.skip("this Pillow has no littlecms")
    found = seen(Image.frombytes("LAB", (3, 1), lab.tobytes()))
    assert np.abs(found - [[[255, 255, 255], [0, 0, 0], [255, 0, 0]]]).max() <= 6


@pytest.mark.parametrize("form", ["GIF", "TIFF", "PNG", "WEBP"])
def test_of_several_frames_the_first_is_shown(form):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    assert np.array_equal(seen(saved(frames[0], form, save_all=True, append_images=frames[1:], **options)), np.full((6, 8, 3), (255, 0, 0)))


def test_pictures_of_phones_in_one_file_with_another_are_read():
    frames = [Image.fromarray(smooth(64, 96)), Image.new("RGB", (16, 16))]
    stored = saved(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert seen(stored).shape == (64, 96, 3)
    assert seen(stored, at_least=(16, 16)).shape == (16, 24, 3)


# Arrays.


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.full((2, 3), 7, dtype=np.uint8), 7),
        (np.full((2, 3, 1), 7, dtype=np.uint8), 7),
        (np.full((2, 3, 3), 7, dtype=np.uint8)[:, ::-1], 7),
        (np.full((2, 3), 7 * 257, dtype=np.uint16), 7),
        (np.full((2, 3, 3), 7 * 257, dtype=np.uint16), 7),
        (np.full((2, 3), 0.2, dtype=np.float32), 51),
        (np.full((2, 3, 3), 0.2, dtype=np.float64), 51),
        (np.full((2, 3, 4), 1.0, dtype=np.float16), 255),
    ],
)
def test_arrays_of_every_allowed_kind_become_rgb(array, expected):
    assert np.array_equal(seen(array), np.full((2, 3, 3), expected))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(3, dtype=np.uint8),
        np.zeros((3, 8, 8), dtype=np.uint8),
        np.zeros((1, 8, 8, 3), dtype=np.uint8),
        np.zeros((8, 8, 2), dtype=np.uint8),
        np.zeros((8, 8, 3), dtype=np.int64),
        np.zeros((8, 8), dtype=bool),
        np.full((8, 8), 255.0),
        np.full((8, 8), -0.1),
        np.full((8, 8), np.nan),
        np.array([["a"]]),
    ],
)
def test_any_other_array_is_refused_with_what_was_expected(array):
    assert "expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)" in refusal(array)


def test_nothing_at_all_is_refused():
    assert refusal(np.zeros((0, 5), dtype=np.uint8)) == "no pixels"
    assert refusal(b"") == "empty file"
    assert "got Tensor" in refusal(torch.zeros(3, 8, 8))
    assert "got NoneType" in refusal(None)


# What can't be read.


def test_what_is_no_file_is_refused_in_two_words(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("hello, this is no picture at all")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in (
        ("nowhere.png", "missing"),
        ("nowhere/a.png", "missing"),
        ("text.png/a.png", "missing"),
        ("a\0b.png", "missing"),
        ("empty.png", "empty file"),
        ("text.png", "not an image"),
        ("folder.png", "a folder"),
        ("pipe.png", "not a file"),
    ):
        assert refusal(f"{tmp_path}/{name}") == reason, name
    assert refusal(tmp_path / ("x" * 5000)) == "File name too long"


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    def denied(*arguments):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.png").write_bytes(saved(noise(4, 4), "PNG"))
    monkeypatch.setattr(images_module, "open", denied, raising=False)
    assert refusal(tmp_path / "a.png") == "permission denied"


@pytest.mark.parametrize(
    ("form", "options"), [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("BMP", {}), ("GIF", {}), ("TIFF", {})]
)
@pytest.mark.parametrize("part", [0.2, 0.5, 0.8, 0.95])
def test_a_truncated_file_is_refused_never_half_shown(form, options, part):
    whole = saved(noise(60, 80), form, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what is missing, then raises
        assert refusal(whole[: int(len(whole) * part)]) == "truncated"
        assert refusal(whole[: int(len(whole) * part)], at_least=(8, 8)) == "truncated"


@given(st.binary(max_size=64), st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "ICO", ""]))
@settings(deadline=None)
def test_no_bytes_raise_anything_but_an_image_error(tail, form):
    head = saved(noise(4, 4), form)[:40] if form else b""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            decode(head + tail, max_megapixels=1)
        except ImageError as error:
            reason = str(error)
            assert reason


def test_a_huge_picture_is_refused_by_its_header():
    # Were it decoded, the lack of pixels would be the reason.
    assert refusal(png_header(20_000, 20_000)) == "400.0 megapixels, limit 100"
    assert refusal(png_header(20_000, 20_000), max_megapixels=0.5) == "400.0 megapixels, limit 0.5"
    assert "megapixels" not in refusal(png_header(100, 100))
    assert refusal(np.broadcast_to(np.uint8(0), (20_000, 20_000))) == "400.0 megapixels, limit 100"
    assert refusal(Image.new("RGB", (200, 100)), max_megapixels=0.01) == "0.0 megapixels, limit 0.01"


def test_pillows_own_limit_neither_warns_nor_stops_nor_changes(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for form, options in (("PNG", {}), ("JPEG", {}), ("GIF", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})):
            whole = saved(smooth(8, 6), form, **options)
            assert np.abs(seen(whole) - smooth(8, 6)).max() < 60
            for how in ("squash", "crop", "pad"):
                resize(decode(whole), (7, 7), how)
    assert Image.MAX_IMAGE_PIXELS == 10
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(saved(smooth(8, 8), "PNG")))


def test_a_program_that_draws_is_not_run():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    assert refusal(eps) == "not an image"


def test_many_threads_decode_alike():
    files = [saved(smooth(40 + i, 50), form) for i in range(10) for form in ("PNG", "JPEG", "GIF", "WEBP")]
    alone = [seen(file, at_least=(10, 10)) for file in files]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda file: seen(file, at_least=(10, 10)), files))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 250), st.integers(1, 250))
@settings(max_examples=50, deadline=None)
def test_scaled_decoding_never_gives_fewer_pixels_than_asked(height, width, least_height, least_width):
    found = seen(saved(smooth(height, width), "JPEG"), at_least=(least_height, least_width))
    assert found.shape[0] >= min(height, least_height)
    assert found.shape[1] >= min(width, least_width)


def test_scaled_decoding_happens_and_looks_like_the_whole_picture_made_small():
    stored = saved(smooth(480, 640), "JPEG", quality=90)
    assert decode(stored, at_least=(100, 100)).size == (160, 120)
    small, whole = (resize(decode(stored, at_least=hint), (96, 96), "squash").astype(int) for hint in ((96, 96), None))
    assert np.abs(small - whole).max() <= 3


# To one size.


def reference(pixels, size, mode):
    """torch's antialiased resize, in floats; for "nearest" the pixel under each middle, in whole numbers."""
    if mode == "nearest":
        y, x = ((2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(size, pixels.shape, strict=False))
        return pixels[y][:, x].transpose(2, 0, 1).astype(float)
    small = interpolate(torch.from_numpy(pixels).permute(2, 0, 1)[None].double(), size, mode=mode, antialias=True, align_corners=False)
    return small[0].numpy()


TWICE_ROUNDED = 1.3  # Pillow rounds after each of its two passes, and the second may magnify what the first has rounded


def faint_noise(height, width):
    """Noise that overshoots neither end, where Pillow clips between its two passes."""
    return 100 + noise(height, width) // 5


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
@pytest.mark.parametrize("size", [(16, 32), (80, 16), (24, 96)])
def test_squash_agrees_with_torch(interpolation, size):
    pixels = faint_noise(40, 48)
    found = resize(Image.fromarray(pixels), size, "squash", interpolation=interpolation)
    assert found.shape == (3, *size)
    assert found.dtype == np.uint8
    assert np.abs(found - reference(pixels, size, interpolation)).max() <= TWICE_ROUNDED


@pytest.mark.parametrize(("shape", "shorter"), [((60, 120), (20, 40)), ((120, 60), (40, 20)), ((10, 30), (20, 60))])
def test_crop_is_the_shorter_side_to_size_and_then_the_middle(shape, shorter):
    pixels = faint_noise(*shape)
    top, left = (shorter[0] - 20) // 2, (shorter[1] - 20) // 2
    expected = reference(pixels, shorter, "bicubic")[:, top : top + 20, left : left + 20]
    assert np.abs(resize(Image.fromarray(pixels), (20, 20), "crop") - expected).max() <= TWICE_ROUNDED


@pytest.mark.parametrize("shape", [(61, 47), (45, 100), (33, 33), (20, 999), (19, 20)])
def test_crop_begins_at_a_whole_pixel_of_the_resized_image_as_in_torchvision(shape):
    image = Image.fromarray(noise(*shape))
    longer = int(20 * max(shape) / min(shape))  # rounded down, as by torchvision's Resize and by transformers
    height, width = (longer, 20) if shape[0] > shape[1] else (20, longer)
    whole = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    top, left = (height - 20) // 2, (width - 20) // 2
    assert np.abs(resize(image, (20, 20), "crop").astype(int) - whole[:, top : top + 20, left : left + 20]).max() <= 1


def test_crop_to_an_oblong_takes_the_middle_too():
    pixels = faint_noise(60, 60)
    expected = reference(pixels, (40, 40), "bilinear")[:, 10:30]
    assert np.abs(resize(Image.fromarray(pixels), (20, 40), "crop", interpolation="bilinear") - expected).max() <= TWICE_ROUNDED


@pytest.mark.parametrize(("shape", "inner"), [((60, 120), (10, 20)), ((120, 60), (20, 10)), ((4, 8), (10, 20))])
def test_pad_is_the_longer_side_to_size_in_the_middle_of_grey(shape, inner):
    pixels = faint_noise(*shape)
    expected = np.full((3, 20, 20), 9.0)
    top, left = (20 - inner[0]) // 2, (20 - inner[1]) // 2
    expected[:, top : top + inner[0], left : left + inner[1]] = reference(pixels, inner, "bicubic")
    assert np.abs(resize(Image.fromarray(pixels), (20, 20), "pad", fill=9) - expected).max() <= TWICE_ROUNDED


def test_pad_is_grey_by_default():
    assert resize(Image.new("RGB", (10, 1)), (10, 10), "pad")[:, 0].tolist() == [[128] * 10] * 3


@pytest.mark.parametrize("how", ["squash", "crop", "pad"])
def test_a_picture_of_the_right_size_stays_as_it_is_and_the_array_may_be_written(how):
    pixels = noise(12, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = resize(Image.fromarray(pixels), (12, 9), how)
        torch.from_numpy(found)
        torch.from_numpy(resize(Image.fromarray(pixels[:1, :1]), (1, 1), how)).add_(1)
    assert np.array_equal(found, pixels.transpose(2, 0, 1))
    assert found.flags.c_contiguous


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 40), st.integers(1, 40), st.sampled_from(["squash", "crop", "pad"]))
def test_any_shape_comes_to_any_size(height, width, to_height, to_width, how):
    found = resize(Image.new("RGB", (width, height), (10, 20, 30)), (to_height, to_width), how, fill=20)
    assert found.shape == (3, to_height, to_width)
    inside = (found == np.array([10, 20, 30]).reshape(3, 1, 1)).all(0)
    assert inside.any()
    if how != "pad":
        assert inside.all()


def test_unknown_ways_are_refused_with_the_nearest_known_one():
    with pytest.raises(UserError, match="Did you mean squash"):
        resize(Image.new("RGB", (4, 4)), (2, 2), "squish")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="Did you mean bicubic"):
        resize(Image.new("RGB", (4, 4)), (2, 2), "squash", interpolation="cubic")  # type: ignore[arg-type]


@pytest.mark.slow
def test_scaled_decoding_is_faster():
    stored = saved(smooth(480, 640), "JPEG", quality=90)
    taken = {}
    for hint in ((224, 224), None):
        begun = time.perf_counter()
        for _ in range(200):
            resize(decode(stored, at_least=hint), (224, 224), "squash")
        taken[hint] = time.perf_counter() - begun
    print({hint: f"{200 / seconds:.0f} images/s" for hint, seconds in taken.items()})
    assert taken[224, 224] < taken[None]


def test_a_jpeg_of_hundreds_of_scans_is_refused_before_it_is_decoded():
    whole = saved(smooth(64, 64), "JPEG", progressive=True)
    assert seen(whole).shape == (64, 64, 3)
    last, end = whole.rindex(b"\xff\xda"), whole.rindex(b"\xff\xd9")
    many = whole[:end] + 200 * whole[last:end] + whole[end:]
    assert refusal(many) == f"{200 + whole.count(bytes([255, 218]))} scans, limit 100"


def test_what_may_contain_a_program_is_not_opened(monkeypatch):
    def field(record, number, content):
        return bytes([0x1C, record, number]) + struct.pack(">H", len(content)) + content

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("run"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    numbers = [field(3, 60, b"\x01\x00"), field(3, 20, b"\x00\x0a"), field(3, 30, b"\x00\x0a"), field(3, 120, b"\x05")]
    assert refusal(b"".join(numbers) + field(8, 10, eps)) == "not an image"


def test_a_side_of_millions_of_pixels_is_refused_by_the_header():
    assert refusal(png_header(25_000_000, 1)).endswith("pixels, limit 65,535 a side")
    assert refusal(np.broadcast_to(np.uint8(0), (1, 100_000))).endswith("pixels, limit 65,535 a side")


@pytest.mark.parametrize("header", [b"{", b"(" * 500, b"{'descr': 1}", b"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 'a')}"])
def test_a_corrupt_array_is_refused_whatever_numpy_raises(header):
    with pytest.raises(ImageError):
        decode(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
