"""Images of more than three channels in a run: read, stored, augmented, encoded, and predicted from raw arrays."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_world import BERT, train
from torch import nn

from fusion.data import FusionData
from fusion.data.kinds import ImageInput, TextInput
from fusion.encoders import TimmImage, TransformersText
from fusion.errors import UserError
from fusion.heads import Gated
from fusion.predictor import Predictor
from fusion.training import Engine


class Seen(nn.Module):
    """An augmentation that notes the shapes that it gets, and mirrors."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def forward(self, pixels):
        self.shapes.add(tuple(pixels.shape))
        return pixels.flip(-1)


@pytest.fixture
def made(write_manifest, tmp_path):
    """(task, data) of the tiny world with images of these channels; `change` writes the image of a row, or leaves its path."""

    def make(change, channels, in_chans, **options):
        torch.manual_seed(0)
        manifest = str(write_manifest(change))
        inputs = {"image": ImageInput(channels=channels), "text": TextInput()}
        data = FusionData(manifest, cache=str(tmp_path / "cache"), batch_size=16, num_workers=0, inputs=inputs, **options)
        image = partial(TimmImage, "test_vit", pretrained=False, image_size=32, options={"in_chans": in_chans})
        return Engine(image=image, text=partial(TransformersText, config=BERT), head=partial(Gated, dim=8)), data

    return make


def as_array(tmp_path, channels):
    """Replaces each row's picture by an array of `channels`, those of RGB first."""

    def change(i, row):
        rgb = np.asarray(Image.open(row["image"]).convert("RGB"))
        path = tmp_path / f"{i}.npy"
        np.save(path, np.concatenate([rgb, rgb[..., ::-1]], axis=-1)[..., :channels])
        return row | {"image": str(path)}

    return change


@pytest.mark.parametrize(("channels", "memory_gib"), [(4, 1.0), (6, 1.0), (6, 0.0)])
def test_a_run_reads_stores_augments_and_predicts_images_of_more_channels(made, tmp_path, channels, memory_gib):
    augment = Seen()
    task, data = made(as_array(tmp_path, channels), channels, channels, augment=[augment], memory_gib=memory_gib)
    trainer = train(task, data)
    assert augment.shapes == {(channels, 32, 32)}
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = Predictor.load(tmp_path / "run.ckpt", device="cpu")
    table = data.splits["test"].table
    arrays = [np.load(path) for path in table.inputs["image"]]
    files, raw = (loaded.predict(images, table.inputs["text"]).probabilities for images in (table.inputs["image"], arrays))
    assert np.array_equal(files, raw)
    other = [np.concatenate([one[..., :3], 255 - one[..., 3:]], axis=-1) for one in arrays]
    assert not np.allclose(loaded.predict(other, table.inputs["text"]).probabilities, raw)
    with pytest.raises(UserError, match=rf"an array \(8, 8, 3\), expected \(H, W, {channels}\)"):
        loaded.predict([np.zeros((8, 8, 3), np.uint8)], ["red?"])


def test_a_file_of_another_number_of_channels_is_a_reported_row(made, tmp_path):
    def change(i, row):
        if i == 3:
            return row
        Image.open(row["image"]).convert("RGBA").save(tmp_path / f"{i}.png")
        return row | {"image": str(tmp_path / f"{i}.png")}

    task, data = made(change, 4, 4)
    task.build(data)
    reasons = [dropped.reason for dropped in data.issues.dropped]
    assert len(reasons) == 1
    assert reasons[0].startswith("image corrupt: 3 channels (RGB), expected 4 (")


@pytest.mark.parametrize(("channels", "in_chans", "readable"), [(4, 3, "3"), (3, 4, "4"), (4, 1, "3 or 1")])
def test_images_that_the_encoder_does_not_read_are_rejected_with_both_numbers(made, channels, in_chans, readable):
    task, data = made(lambda i, row: row, channels, in_chans)
    with pytest.raises(UserError, match=rf"images of {channels} channels, but their encoder reads {readable}; set the input's channels="):
        task.build(data)


def test_greyscale_images_are_stored_with_one_channel(made):
    task, data = made(lambda i, row: row, 1, 1)
    task.build(data)
    assert next(iter(data.train_dataloader())).inputs["image"].pixels.shape[1:] == (1, 32, 32)
    with pytest.raises(UserError, match="channels is 0; expected at least 1"):
        ImageInput(channels=0)
