"""What was found of images is remembered only as long as nothing that decides it has changed."""

import os
import time
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from fusion.data.image_check import check_images, shared_file
from fusion.data.kinds.image import ImageStore
from fusion.errors import UserError
from fusion.processing.images import ImageSpec


@pytest.fixture
def pictures(tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for i, path in enumerate(paths):
        Image.fromarray(np.full((40, 50, 3), 80 * i, np.uint8)).save(path)
    return paths


def check(pictures, memory_gib=0.0, **spec):
    return check_images(pictures, ImageSpec((16, 16), **spec), memory_gib=memory_gib, cache=Path(pictures[0]).parent)


@pytest.mark.parametrize("limits", [(0.001, 100), (100, 0.001)])
def test_another_limit_is_another_verdict(pictures, limits):
    for limit in limits:
        assert len(check(pictures, max_megapixels=limit).bad) == (3 if limit < 1 else 0)


def test_other_versions_of_the_libraries_check_anew(pictures, monkeypatch):
    def refused(*_):
        raise AssertionError("decoded again")

    check(pictures)
    with monkeypatch.context() as patched:
        patched.setattr("fusion.data.image_check.load_image", refused)
        assert check(pictures).bad == {}
        patched.setattr(PIL, "__version__", "0.0")
        with pytest.raises(AssertionError, match="decoded again"):
            check(pictures)


def test_a_file_that_changed_is_checked_anew(pictures):
    check(pictures)
    with open(pictures[1], "wb") as file:
        file.write(b"no picture")
    found = check(pictures)
    assert list(found.bad) == [pictures[1]]
    assert found.digests.keys() == {pictures[0], pictures[2]}


@pytest.mark.parametrize("memory_gib", [0.0, 1.0])
def test_digests_follow_the_bytes_not_the_time(pictures, memory_gib):
    before = check(pictures, memory_gib)
    os.utime(pictures[0], (1, 1))
    Image.fromarray(np.full((40, 50, 3), 7, np.uint8)).save(pictures[2])
    after = check(pictures, memory_gib)
    assert [after.digests[path] == before.digests[path] for path in pictures] == [True, True, False]
    assert len(set(before.digests.values())) == 3
    assert (before.pixels is not None) == bool(memory_gib)


def test_processes_of_a_machine_share_one_copy_of_the_pixels(pictures, tmp_path, monkeypatch):
    Path(pictures[1]).write_bytes(b"no picture")
    spec, cache = ImageSpec((16, 16)), tmp_path / "cache"
    alone = check(pictures, 1.0)
    first = check_images(pictures, spec, memory_gib=1.0, cache=cache, shared=True)
    monkeypatch.setattr("fusion.data.image_check.load_image", None)  # the second decodes nothing
    second = check_images(pictures, spec, memory_gib=1.0, cache=cache, shared=True)
    for found in (first, second):
        assert torch.equal(found.pixels, alone.pixels)
        assert (found.bad, found.digests) == (alone.bad, alone.digests)
    file = shared_file(pictures, spec, cache)
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(file) in line]
    assert len(mapped) == 2
    first.pixels[0, 0, 0, 0] += 1  # what one writes is its own
    assert torch.equal(second.pixels, alone.pixels)
    file.unlink()
    assert torch.equal(second.pixels, alone.pixels)


def test_shared_pixels_of_killed_runs_are_removed_after_a_day(pictures, tmp_path):
    spec, hour = ImageSpec((16, 16)), 3600
    for i, age in enumerate((2 * hour, 30 * hour)):
        file = shared_file(pictures[:i], spec, tmp_path)
        file.write_bytes(b"")
        os.utime(file, (time.time() - age,) * 2)
    check_images(pictures, spec, memory_gib=1.0, cache=tmp_path, shared=True)
    kept = {shared_file(pictures[:0], spec, tmp_path), shared_file(pictures, spec, tmp_path)}
    assert set(tmp_path.glob("pixels-*")) == kept


def test_an_image_that_went_bad_after_its_check_is_named(pictures):
    store = ImageStore(pictures, ImageSpec((16, 16)))
    os.remove(pictures[1])
    with pytest.raises(UserError, match=rf"{pictures[1]}: missing; it was readable when the images were checked.*--resume"):
        store.batch(np.array([0, 1]))


def test_a_corrupt_memory_of_verdicts_is_made_anew(pictures):
    before = check(pictures)
    (memory,) = Path(pictures[0]).parent.glob("checked-*.parquet")
    memory.write_bytes(b"torn")
    assert check(pictures) == before


def test_a_cache_that_cannot_be_written_is_one_error_with_another_place(pictures):
    taken = Path(pictures[0])
    with pytest.raises(UserError, match=f"can't write to {taken}.*--data.cache=FOLDER"):
        check_images(pictures, ImageSpec((16, 16)), memory_gib=0.0, cache=taken)


@pytest.mark.parametrize("memory_gib", [0.0, 1.0])
def test_a_path_that_no_file_can_have_is_missing(pictures, memory_gib):
    assert check([*pictures, "a\0b.png"], memory_gib).bad == {"a\0b.png": "missing"}
