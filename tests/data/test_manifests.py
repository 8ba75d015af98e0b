"""Which sample is in which split: files of their own, given splits, and what contradicts them."""

import csv

import pytest

from fusion.data import FusionData
from fusion.data.format import Format
from fusion.data.issues import DataIssues
from fusion.data.kinds import TextInput
from fusion.data.manifests import read_manifests
from fusion.data.table import Columns
from fusion.errors import UserError
from fusion.tasks import Classification

TEXT = {"text": TextInput()}


@pytest.fixture
def file(tmp_path):
    """Writes a manifest of texts and labels, one row a split named ("" for none)."""

    def write(name, splits, group=None):
        with open(tmp_path / name, "w", newline="") as opened:
            writer = csv.writer(opened)
            writer.writerow(["text", "label", *(["split"] if any(splits) else []), *(["group"] if group else [])])
            for i, split in enumerate(splits):
                row = [f"{name} text {i}", "ab"[i % 2], *([split] if any(splits) else []), *([f"{group}{i // 4}"] if group else [])]
                writer.writerow(row)
        return str(tmp_path / name)

    return write


def read(main, val=None, test=None, issues=None):
    return read_manifests(
        main, {"val": val, "test": test}, Columns(), TEXT, Classification(), format=Format(), issues=issues or DataIssues("drop")
    )


def splits_of(**options):
    data = FusionData(**options)
    table = data.split_table(TEXT, Classification())
    rows = list(zip(table.inputs["text"], table.splits, strict=True))
    return data, {split: {text for text, s in rows if s == split} for split in ("train", "val", "test")}


def test_given_test_rows_stay_test_beside_a_validation_file(file):
    main = file("m.csv", ["train"] * 90 + ["test"] * 30)
    _, found = splits_of(manifest=main, val_manifest=file("v.csv", [""] * 20))
    assert found["test"] == {f"m.csv text {i}" for i in range(90, 120)}
    assert found["train"] == {f"m.csv text {i}" for i in range(90)}
    assert found["val"] == {f"v.csv text {i}" for i in range(20)}


def test_what_no_file_gives_is_carved_out_of_the_training_file_alone(file):
    _, found = splits_of(manifest=file("m.csv", [""] * 100), val_manifest=file("v.csv", [""] * 20), test=0.2)
    assert len(found["test"]) == 20
    assert all(text.startswith("m.csv") for text in found["train"] | found["test"])


def test_a_split_given_by_rows_and_by_a_file_is_refused(file):
    with pytest.raises(UserError, match=r"m.csv gives 5 rows to val \(the first: row 12\).*val_manifest=.*v.csv.*columns.split=null"):
        read(file("m.csv", ["train"] * 10 + ["dev"] * 5), val=file("v.csv", [""] * 4))


def test_rows_of_another_split_in_a_file_of_its_own_are_refused(file):
    with pytest.raises(UserError, match=r"v.csv is given for val, but 2 of its rows name another split \(the first: row 3, 'test'"):
        read(file("m.csv", [""] * 10), val=file("v.csv", ["val", "test", "test", ""]))


def test_rows_are_chosen_by_any_column(file):
    main = file("m.csv", ["train", "dev", "test"] * 10)
    for where, count in (({"split": "val"}, 10), ({"text": "m.csv text 3"}, 1), ({"label": ["a"], "split": ["train", "test"]}, 10)):
        assert len(FusionData(manifest=main, where=where, val=0, test=0).table(TEXT, Classification())) == count


def test_one_file_for_validation_and_test_is_both_and_is_reported(file):
    main, dev = file("m.csv", [""] * 30, group="m"), file("dev.csv", [""] * 8, group="d")
    data, found = splits_of(manifest=main, val_manifest=dev, test_manifest=dev)
    assert found["val"] == found["test"] == {f"dev.csv text {i}" for i in range(8)}
    assert len(found["train"]) == 30
    assert "is given for val and for test" in data.issues.notes[0]
    data.check_leaks(data.split_table(TEXT, Classification()))
    assert data.shared_inputs["test", "val"] == 8


def test_the_training_file_as_validation_is_used_and_reported(file):
    main = file("m.csv", [""] * 30)
    data, found = splits_of(manifest=main, val_manifest=main)
    assert len(found["val"]) == 30
    assert found["train"]
    assert "is given for train and for val; validation samples are trained on" in data.issues.notes[0]


def test_a_bad_row_of_a_file_given_twice_is_listed_once(file, tmp_path):
    (tmp_path / "dev.csv").write_text("text,label\nt,a\nu,\n")
    issues = DataIssues("drop")
    table = read(file("m.csv", [""] * 4), val=str(tmp_path / "dev.csv"), test=str(tmp_path / "dev.csv"), issues=issues)
    assert [issue.row for issue in issues.dropped] == [3]
    assert len(set(table.ids)) == len(table) == 6


def test_files_of_one_name_in_two_folders_have_ids_of_their_own(file, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "m.csv").write_text("text,label\nt,a\nu,b\n")
    table = read(file("m.csv", [""] * 4), val=str(tmp_path / "other" / "m.csv"))
    assert len(set(table.ids)) == 6


def test_a_training_row_whose_group_is_held_out_in_another_file_is_a_leak_not_moved(file):
    data = FusionData(manifest=file("m.csv", [""] * 8, group="g"), val_manifest=file("v.csv", [""] * 4, group="g"), test=0)
    with pytest.raises(UserError, match=r"1 groups are in train and in another split \(the first: 'g0' in train, val\).* Fix the files"):
        data.check_leaks(data.split_table(TEXT, Classification()))


def test_a_leak_between_given_splits_is_told_before_others_are_carved(file, tmp_path):
    rows = "".join(f"t{i},{'xy'[i % 2]},{'train' if i < 10 else 'test'},g{i % 10}\n" for i in range(20))
    (tmp_path / "m.csv").write_text(f"text,label,split,group\n{rows}")
    with pytest.raises(UserError, match="10 groups are in train and in another split"):
        FusionData(manifest=str(tmp_path / "m.csv")).split_table(TEXT, Classification())


def test_a_file_read_in_another_encoding_that_would_be_utf8_is_noted(tmp_path):
    notes = {}
    for name, encoding in ("one", "cp1252"), ("other", "utf-8"):
        (tmp_path / f"{name}.csv").write_text("text,label\ngr\u00f6\u00dfe,x\nb,y\n", encoding=encoding)
        data = FusionData(manifest=str(tmp_path / f"{name}.csv"), format=Format(encoding="cp1252"))
        data.table(TEXT, Classification())
        notes[name] = data.issues.notes
    assert not notes["one"]
    assert "other.csv is read as cp1252, but is valid UTF-8" in notes["other"][0]


def test_a_given_split_that_a_filter_empties_is_not_carved_anew(file):
    main = file("m.csv", ["train", "train", "test"] * 10)
    with pytest.raises(UserError, match=r"data.where selects no row of the given split test; .*--data.test=0"):
        splits_of(manifest=main, where={"split": "train"})
    assert not splits_of(manifest=main, where={"split": "train"}, test=0)[1]["test"]


def test_a_file_of_its_own_that_a_filter_empties_is_not_replaced_by_a_carved_split(file, tmp_path):
    (tmp_path / "m.csv").write_text("text,label,kind\n" + "".join(f"t{i},{'xy'[i % 2]},shoe\n" for i in range(20)))
    with pytest.raises(UserError, match=r"data.where selects no row of the given split val; .*--data.val=0"):  # v.csv has no such column
        splits_of(manifest=str(tmp_path / "m.csv"), val_manifest=file("v.csv", [""] * 6), where={"kind": "shoe"})


def test_a_column_of_splits_in_capitals_is_noted(tmp_path):
    (tmp_path / "m.csv").write_text("text,label,Split\n" + "".join(f"t{i},{'xy'[i % 2]},train\n" for i in range(20)))
    data, _ = splits_of(manifest=str(tmp_path / "m.csv"))
    assert "column 'Split' is not used as 'split'; to use it: --data.columns.split=Split" in data.issues.notes[0]


def test_a_given_split_without_a_usable_row_is_noted(tmp_path):
    rows = "".join(f"t{i},{'xy'[i % 2]},train\n" for i in range(20)) + "u,,test\n"
    (tmp_path / "m.csv").write_text("text,label,split\n" + rows)
    data, _ = splits_of(manifest=str(tmp_path / "m.csv"))
    assert any("no row of the split 'test'" in note for note in data.issues.notes)
