"""A run on a part of the data: rows of one kind, and fewer training samples."""

import csv
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.data import Columns, FusionData
from fusion.data.kinds import TextInput
from fusion.data.module import wanted_cells
from fusion.data.splits import draw_stratified
from fusion.encoders import TransformersText
from fusion.errors import UserError
from fusion.settings.parser import FusionCLI
from fusion.tasks import Classification

TEXT = {"text": TextInput()}


@pytest.fixture
def manifest(tmp_path):
    """A hundred texts: two classes, one of them a quarter; two kinds, alternating in fours; the last twenty in test."""
    path = tmp_path / "manifest.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "kind", "split"])
        for i in range(100):
            label, kind = "no" if i % 4 else "yes", "closed" if i // 4 % 2 else "open"
            writer.writerow([f"text {i}", label, kind, "test" if i >= 80 else "train"])
    return path


def table_of(manifest, **options):
    return FusionData(str(manifest), val=0.2, **options).split_table(TEXT, Classification())


def texts_of(table, split):
    return [text for text, of in zip(table.inputs["text"], table.splits, strict=True) if of == split]


@given(st.lists(st.sampled_from("aaaabbbc"), min_size=1, max_size=60), st.integers(1, 80), st.integers(0, 1000))
def test_a_draw_has_the_asked_size_every_class_and_the_proportions(labels, count, seed):
    sizes = Counter(labels)
    if count < len(sizes):
        with pytest.raises(UserError, match=rf"train_samples is {count}; expected at least one sample of each of the {len(sizes)}"):
            draw_stratified(labels, count, seed)
        return
    drawn = draw_stratified(labels, count, seed)
    assert drawn == sorted(set(drawn))
    assert len(drawn) == min(count, len(labels))
    found = Counter(labels[i] for i in drawn)
    assert set(found) == set(sizes)
    share = len(drawn) / len(labels)
    # Beside rounding, what the classes too rare for their share take from the others.
    given_up = sum(max(0.0, 1 - share * size) for size in sizes.values())
    for label, size in sizes.items():
        assert abs(found[label] - share * size) < 1 + given_up + 1e-6


def test_another_seed_draws_other_samples():
    labels = ["a"] * 50 + ["b"] * 50
    draws = [draw_stratified(labels, 20, seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    assert np.ptp(draws[0]) > 50  # from the whole of the table


def test_fewer_training_samples_leave_val_and_test_as_they_are(manifest):
    whole, share = table_of(manifest), table_of(manifest, train_samples=16)
    assert len(texts_of(whole, "train")) == 64
    assert len(texts_of(share, "train")) == 16
    assert set(texts_of(share, "train")) < set(texts_of(whole, "train"))
    assert [texts_of(share, split) for split in ("val", "test")] == [texts_of(whole, split) for split in ("val", "test")]
    labels = Counter(label for label, split in zip(share.labels, share.splits, strict=True) if split == "train")
    assert labels == {"yes": 4, "no": 12}


def test_samples_left_out_are_recorded_without_split_and_loaded_nowhere(manifest):
    data = FusionData(str(manifest), val=0.2, train_samples=16)
    data.load(
        {"text": TransformersText(config={"model_type": "bert", "hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1})},
        Classification(),
    )
    assert {name: len(split.table) for name, split in data.splits.items()} == {"train": 16, "val": 16, "test": 20}
    assert data.record.columns["split"].count(None) == 48
    assert len(data.record) == 100


def test_more_training_samples_than_there_are_leave_all(manifest):
    assert len(texts_of(table_of(manifest, train_samples=1000), "train")) == 64


def test_rows_are_chosen_by_the_value_of_a_column(manifest):
    table = table_of(manifest, where={"kind": "closed"})
    assert set(table.extra["kind"]) == {"closed"}
    assert len(table) == 48
    assert len(texts_of(table, "test")) == 8
    assert len(table_of(manifest, where={"kind": ["closed", "open"]})) == 100
    assert set(table_of(manifest, where={"kind": "closed", "label": ["yes"]}).labels) == {"yes"}


def test_an_unknown_column_or_value_is_rejected_with_the_nearest(manifest):
    with pytest.raises(UserError, match=r"data\.where: the manifest has no column 'kinds'. Did you mean kind\?"):
        table_of(manifest, where={"kinds": "closed"})
    for asked in ("CLOSED", ["open", "CLOSED"]):
        with pytest.raises(UserError, match=r"data\.where: no row has 'CLOSED' in column 'kind'. Did you mean closed\?"):
            table_of(manifest, where={"kind": asked})


def test_a_filter_that_no_row_can_fit_is_rejected(manifest, tmp_path):
    with pytest.raises(UserError, match=r"data\.where\.kind is an empty list, which matches no row"):
        table_of(manifest, where={"kind": []})
    bare = tmp_path / "bare.csv"
    bare.write_text("text,label,note\nt,a,\nu,b,\n")
    with pytest.raises(UserError, match=r"data\.where: column 'note' is empty in every row"):
        table_of(bare, where={"note": "x"})


def test_rows_are_chosen_by_the_manifests_own_names_and_by_inputs_that_the_model_does_not_read(tmp_path):
    (tmp_path / "m.csv").write_text("picture,question,answer\n" + "".join(f"imgs/{i % 5}.png,q{i % 2}?,{'xy'[i % 2]}\n" for i in range(40)))
    columns = Columns(image="picture", text="question", label="answer")
    for where, count in ({"question": "q1?"}, 20), ({"picture": ["imgs/1.png", "imgs/2.png"]}, 16), ({"answer": "x"}, 20):
        for modalities in ("text",), ("image",), ("image", "text"):
            data = FusionData(manifest=str(tmp_path / "m.csv"), columns=columns, where=where)
            assert len(data.table(data.kinds(modalities), Classification())) == count


def test_values_of_the_command_line_arrive_as_they_are_written():
    words = ["--recipe=quickstart", "--data.where={a: CLOSED, b: [3, 0.5], c: 'yes', d: [no, x], e: 010, f: 12:30:00, g: 9007199254740993}"]
    where = FusionCLI(words).config.data.where
    expected = [["CLOSED"], ["3", "0.5"], ["yes"], ["no", "x"], ["010"], ["12:30:00"], ["9007199254740993"]]
    assert [wanted_cells(name, where[name]) for name in "abcdefg"] == expected


def test_values_of_a_recipe_arrive_as_they_are_written_also_when_the_run_is_read_again(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("extends: quickstart\ndata:\n  where: {big: 9007199254740993, many: [2019, 0.5, yes], code: 010, clock: 12:30:00}\n")
    cli = FusionCLI([f"--recipe={recipe}"])
    (tmp_path / "recipe.yaml").write_text(cli.resolved())
    for where in (cli.config.data.where, FusionCLI(["--config", str(tmp_path / "recipe.yaml")]).config.data.where):
        found = {name: wanted_cells(name, where[name]) for name in where}
        assert found == {"big": ["9007199254740993"], "many": ["2019", "0.5", "yes"], "code": ["010"], "clock": ["12:30:00"]}


def test_booleans_of_python_have_lost_their_spelling():
    with pytest.raises(UserError, match=r"data\.where\.label: yes, no, true and false are booleans in YAML"):
        wanted_cells("label", [True])
