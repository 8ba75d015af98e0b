"""Kinds of input: how columns of a table are told apart, scaled and masked; several pictures of a sample; state."""

import json
import os

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.preprocessing import QuantileTransformer

from fusion.data.kinds import ImageInput, Kind, TableInput, TextInput
from fusion.data.kinds.base import Checking, Reading
from fusion.data.kinds.image import ImageStore, ShownImages
from fusion.data.kinds.table import kind_of
from fusion.encoders import TableColumns, TimmImage
from fusion.errors import UserError
from fusion.processing.images import ImageSpec
from fusion.processing.table import number_of, scale_of, scaled


def table(rows, train=None, **options):
    """A table input that has learnt of rows (dicts of cells), and its cells."""
    names = list(rows[0])
    kind = TableInput(names, **options)
    columns = {name: [row[name] for row in rows] for name in names}
    cells = kind.read(columns, Reading("m.csv", range(len(rows)), set()))
    encoder = TableColumns(8, heads=2)
    bad = kind.check(cells, encoder, Checking(1.0, os.devnull))
    kind.learn(cells[:train], encoder)
    return kind, cells, bad, encoder


# Columns of a table.


@given(st.lists(st.floats(-1e6, 1e6), min_size=30, max_size=200), st.lists(st.floats(-2e6, 2e6), min_size=1, max_size=10))
def test_numbers_are_scaled_by_quantiles_as_scikit_learn_does(train, others):
    train = np.round(train, 3)
    reference = QuantileTransformer(n_quantiles=len(train), output_distribution="normal", subsample=None).fit(train[:, None])
    reference.quantiles_[:, 0] = np.sort(train)  # without the rounding of theirs, by which ties come to look different
    numbers = np.concatenate([train, others])
    found = scaled(numbers, scale_of(train, "quantile"), "quantile")
    if train.min() == train.max():
        assert np.isfinite(found).all()
        return
    expected = reference.transform(numbers[:, None])[:, 0]
    inside = np.abs(expected) < 3  # theirs end at 5.2 deviations, ours at 3.1
    assert np.allclose(found[inside], expected[inside], atol=1e-5)
    assert (np.sign(found[~inside]) == np.sign(expected[~inside])).all()
    assert np.abs(found).max() < 3.1


def test_numbers_are_scaled_by_mean_and_deviation_if_asked():
    kind, cells, *_ = table([{"x": "1"}, {"x": "3"}, {"x": "8"}], scaling="standard")
    x = np.array([1.0, 3.0, 8.0])
    assert np.allclose(kind.arrays(cells)[0][:, 0], (x - x.mean()) / x.std(), atol=1e-6)


def test_columns_are_told_apart_by_most_of_their_cells():
    rows = [{"n": str(i / 2), "d": f"2024-01-{1 + i:02}", "c": "ab"[i % 2], "zip": f"0{i}"} for i in range(20)]
    rows[3] |= {"n": "n/a", "d": ""}
    kind, _, bad, encoder = table(rows, categories=["zip"])
    assert kind.kinds == {"n": "number", "d": "date", "c": "category", "zip": "category"}
    assert bad == {3: "column n has 'n/a', expected a number"}
    assert encoder.counts == (2, [3, 21])
    assert number_of("2024-01-02", "date") - number_of("2024-01-01 12:00:00", "date") == 0.5
    assert number_of("2024-01-01T00:00:00+01:00", "date") == number_of("2023-12-31T23:00:00Z", "date")
    assert kind_of(["1"] * 8 + ["x"] * 2) == "category"
    assert np.isnan(number_of("0001-01-01 00:00:00+01:00", "date"))


def test_missing_cells_are_masked_and_unknown_categories_share_a_bucket():
    rows = [{"n": "1", "c": "a"}, {"n": "2", "c": "b"}, {"n": "", "c": "new"}, {"n": " ", "c": ""}]
    kind, cells, _, _ = table(rows, train=2)
    assert cells[3] is None
    store = kind.store(cells, training=False)
    batch = store.batch(np.arange(4), 0)
    assert batch.mask.tolist() == [[True, True], [True, True], [False, True], [False, False]]
    assert batch.present.tolist() == [True, True, True, False]
    assert batch.categories.tolist() == [[1], [2], [0], [0]]
    assert batch.full is False
    assert store.batch(np.array([0, 1]), 0).full is True
    assert store.notes == ["1 have a category that does not occur in train"]


@pytest.mark.parametrize("make", [dict, pa.table])
def test_raw_tables_give_what_the_manifest_gives(make):
    rows = [{"n": "1.5", "c": "a"}, {"n": "2", "c": "b"}, {"n": "", "c": ""}]
    kind, cells, _, _ = table(rows)
    assert kind.raw(make({"c": ["a", "b", None], "n": [1.5, 2.0, None]}), "facts") == cells
    with pytest.raises(UserError, match="facts is a list; expected a mapping or a table with columns n, c"):
        kind.raw([1, 2], "facts")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": []}, "at least one"),
        ({"columns": ["a", "a"]}, "each once"),
        ({"columns": ["a"], "categories": ["b"]}, "categories name 'b'"),
        ({"columns": ["a"], "scaling": "log"}, "scaling is 'log'"),
    ],
)
def test_tables_that_make_no_sense_are_rejected(options, message):
    with pytest.raises(UserError, match=message):
        TableInput(**options)


# Several pictures.


def test_samples_of_several_pictures_share_them(tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for i, path in enumerate(paths):
        Image.new("RGB", (8, 8), (80 * i, 0, 0)).save(path)
    rows = np.array([[0, 2], [2, -1], [-1, -1], [1, 0]])
    store = ShownImages(ImageStore(paths, ImageSpec((8, 8))), rows)
    batch = store.batch(np.array([0, 1, 2]), 0)
    assert batch.pixels.shape == (2, 3, 8, 8)
    assert batch.image_mask.tolist() == [[True, True], [True, False], [False, False]]
    assert batch.present.tolist() == [True, True, False]
    assert batch.pixels[batch.image_index[0]][:, 0, 0, 0].tolist() == [0, 160]
    assert store.distinct().tolist()[2] == -1
    assert len(set(store.distinct().tolist())) == 4


def test_pictures_that_cannot_be_read_cost_their_sample_alone(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    good, broken = str(tmp_path / "a.png"), b"no picture"
    kind = ImageInput()
    cells = [good, (good, broken), (tmp_path / "a.png").read_bytes(), None, (str(tmp_path / "none.png"), good)]
    encoder = TimmImage("test_vit", pretrained=False, image_size=16)
    bad = kind.check(cells, encoder, Checking(1.0, tmp_path))
    assert bad == {1: "image corrupt: not an image (10 bytes)", 4: f"image missing: {tmp_path / 'none.png'}"}
    assert (kind.max_images, kind.digest(good)) == (2, kind.digest(cells[2]))
    assert kind.digest(cells[1]) == ""
    unreadable = {}
    batch = kind.batch(cells, unreadable)
    assert sorted(unreadable) == [1, 4]
    assert batch.image_mask.tolist() == [[True, False], [True, True], [True, False], [False, False], [True, True]]


# State.


def test_state_is_plain_data_and_brings_every_kind_back(tmp_path):
    facts, cells, _, _ = table([{"n": "1", "c": "a"}, {"n": "2", "c": "b"}])
    picture = ImageInput(column="photo", resize="pad")
    picture.check([], TimmImage("test_vit", pretrained=False, image_size=16), Checking(1.0, tmp_path))
    for kind in (facts, picture):
        again = Kind.from_state(json.loads(json.dumps(kind.state())))
        assert again.state() == kind.state()
        assert again.columns == kind.columns
        assert not list(again.differences(kind.learnt()))
    again = Kind.from_state(facts.state())
    assert torch.equal(again.batch(cells, {}).numbers, facts.batch(cells, {}).numbers)
    other, *_ = table([{"n": "1", "c": "a"}, {"n": "5", "c": "b"}])
    assert list(other.differences(facts.learnt())) == ["column 'n' has other values in train"]
    with pytest.raises(UserError, match="but it is no Kind"):
        Kind.from_state(TextInput("a").init_args | {"class": "torch.nn.Linear", "init": {}, "learnt": {}})
