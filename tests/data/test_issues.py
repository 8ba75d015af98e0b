"""The issues of samples that could not be used."""

import csv
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.data.issues import DataIssues, Issue
from fusion.errors import UserError


def read_back(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_an_empty_ledger_writes_its_header_alone(tmp_path):
    DataIssues("drop").write(tmp_path / "data_issues.csv")
    assert read_back(tmp_path / "data_issues.csv") == [["file", "row", "id", "reason"]]


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0"), max_size=20)


@given(st.lists(st.builds(Issue, cells, st.none() | st.integers(1), cells, cells), max_size=10))
def test_what_was_added_is_what_the_file_holds(tmp_path_factory, added):
    issues = DataIssues("drop")
    for issue in added:
        issues.add(*issue)
    path = tmp_path_factory.mktemp("issues") / "issues.csv"
    issues.write(path)
    assert issues.dropped == added
    assert read_back(path)[1:] == [[i.file, "" if i.row is None else str(i.row), i.id, i.reason] for i in added]


def test_an_id_that_is_no_valid_text_is_written_escaped(tmp_path):
    issues = DataIssues("drop")
    issues.add("m.csv", 2, "caf\udce9", "not UTF-8 (byte 0xe9 in column id)")
    issues.write(tmp_path / "issues.csv")
    assert read_back(tmp_path / "issues.csv")[1][2] == "caf\\udce9"


def test_a_write_that_fails_leaves_the_old_file_whole_and_nothing_beside_it(tmp_path, monkeypatch):
    issues = DataIssues("drop")
    issues.write(tmp_path / "issues.csv")
    before = (tmp_path / "issues.csv").read_bytes()
    issues.add("m.csv", 2, "a", "label is missing")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        issues.write(tmp_path / "issues.csv")
    assert (tmp_path / "issues.csv").read_bytes() == before
    assert os.listdir(tmp_path) == ["issues.csv"]


def test_the_written_file_has_the_permissions_of_any_other_new_file(tmp_path):
    DataIssues("drop").write(tmp_path / "issues.csv")
    (tmp_path / "other").write_text("")
    assert (tmp_path / "issues.csv").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_the_summary_counts_by_kind_of_reason_commonest_first():
    issues = DataIssues("drop")
    for i in range(5):
        issues.add("m.csv", i, str(i), f"image corrupt: truncated (/data/{i}.png)")
    for i in range(12):
        issues.add("m.csv", i, str(i), f"image missing: /data/{i}.png")
    assert issues.summary() == "17 samples dropped: 12 image missing, 5 image corrupt; see data_issues.csv"


def test_the_summary_of_one_sample_and_of_none_reads_well():
    issues = DataIssues("drop")
    assert issues.summary() == "no samples dropped"
    issues.add("m.csv", 2, "a", "label is missing")
    assert issues.summary() == "1 sample dropped: 1 label is missing; see data_issues.csv"


def test_the_summary_stays_one_short_line_when_every_reason_differs():
    issues = DataIssues("drop")
    for i in range(1000):
        issues.add("m.csv", i, str(i), f"reason {i}")
    assert issues.summary().endswith("995 for other reasons; see data_issues.csv")
    assert "\n" not in issues.summary()


def test_with_error_the_first_bad_sample_stops_and_is_named():
    with pytest.raises(UserError) as caught:
        DataIssues("error").add("m.csv", 7, "cat-1", "label is missing")
    for part in ("m.csv", "row 7", "cat-1", "label is missing", "on_bad_sample=drop"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_note_is_kept_once_and_stops_nothing():
    issues = DataIssues("error")
    for text in ("m.csv is separated by ';'", "row 3 is odd", "m.csv is separated by ';'"):
        issues.note(text)
    assert issues.notes == ["m.csv is separated by ';'", "row 3 is odd"]
    assert issues.dropped == []


def test_an_unknown_action_is_refused_with_the_nearest_known_one():
    with pytest.raises(UserError, match="Did you mean drop"):
        DataIssues("dropp")  # type: ignore[arg-type]
