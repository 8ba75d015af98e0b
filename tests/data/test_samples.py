"""Samples and the batches made of them."""

import numpy as np
import pytest
import torch
from PIL import Image

from fusion.data.kinds.image import ImageStore, ShownImages
from fusion.data.kinds.text import TextStore
from fusion.data.sampler import PLACEHOLDER, Draw
from fusion.data.samples import Samples, as_is
from fusion.processing.images import ImageSpec
from fusion.processing.tokenizer import Tokenizer

SPEC = ImageSpec((8, 8))
TEXTS = ["zero", "one one", None, "three", "four", "five five five"]
# Which of four pictures each of the six samples shows.
ROW_OF = np.array([2, 0, 2, -1, 3, 0])


@pytest.fixture
def paths(tmp_path):
    """Four pictures, each of one colour."""
    for i in range(4):
        Image.new("RGB", (8, 8), (10 * i + 5, 20 * i + 7, 30 * i + 9)).save(tmp_path / f"{i}.png")
    return [str(tmp_path / f"{i}.png") for i in range(4)]


def colour(i):
    return torch.tensor([10 * i + 5, 20 * i + 7, 30 * i + 9], dtype=torch.uint8)[:, None, None].expand(3, 8, 8)


@pytest.fixture(params=["in memory", "from files"])
def store(request, paths):
    return ImageStore(paths, SPEC, torch.stack([colour(i) for i in range(4)]) if request.param == "in memory" else None)


def made(store, augment=None):
    tokenizer = Tokenizer.train([text for text in TEXTS if text], vocab_size=60, max_length=8)
    return Samples(np.arange(6), {"image": ShownImages(store, ROW_OF, augment), "text": TextStore(tokenizer, tokenizer.encode(TEXTS))})


def batch_of(samples, indices, seed=0):
    return samples.__getitems__(Draw(indices, seed))


def test_a_batch_holds_each_distinct_picture_once_and_maps_back_to_the_right_pixels(store):
    images = batch_of(made(store), [0, 1, 2, 4, 5]).inputs["image"]
    assert len(images.pixels) == 3
    for position, sample in enumerate([0, 1, 2, 4, 5]):
        assert torch.equal(images.pixels[images.image_index[position]], colour(ROW_OF[sample]))
    assert images.present.all()
    assert images.pixels.dtype == torch.uint8


def test_a_sample_without_a_picture_or_a_text_is_absent(store):
    batch = batch_of(made(store), [1, 2, 3])
    images, texts = batch.inputs["image"], batch.inputs["text"]
    assert images.present.tolist() == [True, True, False]
    assert texts.mask.any(dim=1).tolist() == [True, False, True]
    assert len(images.pixels) == 2
    assert int(images.image_index[2]) < len(images.pixels)  # an index, valid for a gather
    assert torch.equal(images.pixels[images.image_index[1]], colour(2))


def test_a_batch_in_which_nobody_has_a_picture_keeps_its_shapes(store):
    images = batch_of(made(store), [3, 3]).inputs["image"]
    assert images.pixels.shape == (1, 3, 8, 8)
    assert images.image_index.tolist() == [0, 0]
    assert not images.present.any()


def test_placeholders_make_valid_rows_that_are_not_counted(store):
    batch = batch_of(made(store), [4, PLACEHOLDER])
    assert batch.sample.tolist() == [4, -1]
    assert batch.target[0] == 4
    assert len(batch.target) == len(batch.inputs["image"].present) == len(batch.inputs["text"].ids) == 2


def test_rows_and_targets_follow_the_draw(store):
    batch = batch_of(made(store), [5, 0, 3])
    assert batch.sample.tolist() == batch.target.tolist() == [5, 0, 3]
    assert batch.target.dtype == batch.sample.dtype == torch.int64


def test_one_sample_is_a_batch_of_one(store):
    batch = made(store)[1]
    assert batch.target.tolist() == [1]
    assert torch.equal(batch.inputs["image"].pixels[0], colour(0))


def test_batches_don_t_change_the_store(paths):
    pixels = torch.stack([colour(i) for i in range(4)])
    kept = ImageStore(paths, SPEC, pixels)
    batch_of(made(kept, augment=lambda one: one.fill_(255)), [0, 1])
    assert torch.equal(pixels, torch.stack([colour(i) for i in range(4)]))


# Augmentation.


def noisy(pixels):
    return (pixels + torch.randint(0, 100, pixels.shape, dtype=torch.uint8)).to(torch.uint8)


def test_augmentation_changes_the_pixels_and_depends_on_nothing_but_the_draws_seed(store):
    samples = made(store, augment=noisy)
    plain = batch_of(made(store), [0, 1, 4], seed=11).inputs["image"].pixels
    first = batch_of(samples, [0, 1, 4], seed=11).inputs["image"].pixels
    torch.manual_seed(99)
    batch_of(samples, [5], seed=12)
    again = batch_of(samples, [0, 1, 4], seed=11).inputs["image"].pixels
    other = batch_of(samples, [0, 1, 4], seed=12).inputs["image"].pixels
    assert not torch.equal(first, plain)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_augmentation_treats_each_picture_of_a_batch_differently(store):
    pixels = batch_of(made(store, augment=noisy), [0, 1], seed=3).inputs["image"].pixels
    plain = batch_of(made(store), [0, 1]).inputs["image"].pixels
    changed = pixels.int() - plain.int()
    assert not torch.equal(changed[0], changed[1])


def test_augmentation_leaves_the_random_state_of_training_alone(store):
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    batch_of(made(store, augment=noisy), [0, 1, 2], seed=11)
    assert torch.equal(torch.rand(3), expected)


def test_augmentation_is_the_same_in_a_worker_as_in_the_main_process(store):
    samples = made(store, augment=noisy)
    draws = [Draw([0, 1], 5), Draw([2, 4], 6), Draw([5, 3], 7)]
    loader = torch.utils.data.DataLoader(samples, batch_sampler=draws, collate_fn=as_is, num_workers=2)
    for draw, batch in zip(draws, loader, strict=True):
        assert torch.equal(batch.inputs["image"].pixels, samples.__getitems__(draw).inputs["image"].pixels)


# Blocks.


def test_samples_of_one_picture_make_a_block_and_those_without_stand_alone(paths):
    samples = Samples(np.arange(7), {"image": ShownImages(ImageStore(paths, SPEC), np.array([2, 0, 2, -1, 3, 0, -1]))})
    blocks = samples.blocks()
    assert blocks[0] == blocks[2]
    assert blocks[1] == blocks[5]
    assert sorted(set(blocks.tolist())) == list(range(5))


def test_without_images_every_sample_is_a_block_of_its_own():
    assert sorted(Samples(np.arange(4), {}).blocks().tolist()) == [0, 1, 2, 3]
