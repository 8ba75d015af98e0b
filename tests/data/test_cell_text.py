"""What a value means: one text for each, whatever file it stands in; and what is missing."""

import datetime
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pandas.core.arrays.arrow.extension_types import ArrowPeriodType
from reading import read_all, written

from fusion.cell_text import cell_text
from fusion.data.table import Columns
from fusion.errors import UserError

FORMATS = {
    "m.csv": lambda frame, path: frame.to_csv(path, index=False),
    "m.tsv": lambda frame, path: frame.to_csv(path, index=False, sep="\t"),
    "m.jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "m.parquet": lambda frame, path: frame.to_parquet(path, index=False),
}
LABELS = {
    "booleans": ([True, False, True], ["True", "False", "True"]),
    "nullable booleans": (pd.array([True, None, False], dtype="boolean"), ["True", None, "False"]),
    "whole floats": ([1.0, -0.0, 3.0], ["1", "0", "3"]),
    "whole numbers with a missing one": ([1, None, 3], ["1", None, "3"]),
    "nullable whole numbers": (pd.array([1, None, 2**60], dtype="Int64"), ["1", None, str(2**60)]),
    "floats": ([0.1, 1e16, 1.5], ["0.1", "1e+16", "1.5"]),
    "categories": (pd.Categorical(["Nan", None, "nan"]), ["Nan", None, "nan"]),
    "categories of numbers": (pd.Categorical([2.0, 1.0, 2.0]), ["2", "1", "2"]),
}


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_table_means_the_same_in_every_format(tmp_path, name, kind):
    values, expected = LABELS[kind]
    FORMATS[name](pd.DataFrame({"text": ["t", "u", "v"], "label": values, "id": values, "note": values}), tmp_path / name)
    table, issues, _ = read_all(tmp_path / name, need_label=False, columns=Columns(id=None))
    assert (table.labels, issues) == (expected, [])
    assert table.extra["id"] == table.extra["note"] == [text or "" for text in expected]


@pytest.mark.parametrize("name", ["m.csv", "m.tsv", "m.parquet"])  # pandas' JSON has digits of doubles, and times as whole numbers
def test_narrow_floats_and_times_mean_the_same_where_the_format_keeps_them(tmp_path, name):
    when = pd.to_datetime(["2024-01-31", "2024-01-31 10:00", "2024-01-31 10:00:00.5"], format="mixed")
    frame = pd.DataFrame(
        {
            "text": ["t", "u", "v"],
            "half": np.array([0.1, 2, np.nan], np.float16),
            "single": np.array([0.1, 2, 1e20], np.float32),
            "day": when.normalize(),
            "when": when,
            "berlin": when.tz_localize("Europe/Berlin"),
            "clock": [datetime.time(10), datetime.time(10, 0, 1), datetime.time(10, 0, 0, 500_000)],
            "lasts": pd.to_timedelta(["1s", None, "-1.5s"]),
            "days": pd.to_timedelta(["1D", None, "-2D"]),
            "mixed": pd.to_timedelta(["1D", "1h", "-2D"]),
        }
    )
    FORMATS[name](frame, tmp_path / name)
    table, _, _ = read_all(tmp_path / name, need_label=False, columns=Columns(label="text"))
    assert table.extra == {
        "half": ["0.1", "2", ""],
        "single": ["0.1", "2", "1e+20"],
        "day": ["2024-01-31"] * 3,
        "when": ["2024-01-31", "2024-01-31 10:00:00", "2024-01-31 10:00:00.5"],
        "berlin": ["2024-01-31 00:00:00+01:00", "2024-01-31 10:00:00+01:00", "2024-01-31 10:00:00.5+01:00"],
        "clock": ["10:00:00", "10:00:01", "10:00:00.5"],
        "lasts": ["0 days 00:00:01", "", "-1 days +23:59:58.5"],
        "days": ["1 days", "", "-2 days"],
        "mixed": ["1 days", "0 days 01:00:00", "-2 days"],
    }


@pytest.mark.parametrize("pandas_is_there", [True, False])
def test_periods_of_parquet_are_rejected_not_read_as_their_numbers(tmp_path, pandas_is_there):
    pd.DataFrame({"text": ["t", "u"], "label": pd.period_range("2024-01", periods=2, freq="M")}).to_parquet(tmp_path / "m.parquet")
    if not pandas_is_there:  # which registers the type
        pa.unregister_extension_type("pandas.period")
    try:
        with pytest.raises(UserError, match=r"has pandas\.period in column 'label', expected text"):
            read_all(tmp_path / "m.parquet")
    finally:
        if not pandas_is_there:
            pa.register_extension_type(ArrowPeriodType("M"))


def test_text_that_is_no_number_or_time_as_a_whole_stays_as_it_is():
    for text in (
        "true",
        "false",
        "nan",
        "v1.0",
        "1.0.0",
        "1.0 m",
        " 1.0",
        "1.50",
        "007",
        "1e5",
        "+1.0",
        "2024-01-31T",
        "T10:00:00",
        "٣.0",
        "",
    ):
        assert cell_text(text) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (pd.NA, None), (pd.NaT, None), (None, None), (np.float32("nan"), None), (np.datetime64("NaT"), None), (Decimal("NaN"), None),
        (np.bool_(True), "True"), (np.int64(3), "3"), (np.str_("nan"), "nan"), (Decimal("3.00"), "3"), (float("inf"), "inf"),
        (pd.Timestamp("2024-01-31"), "2024-01-31"), (datetime.datetime(2024, 1, 31, 10, 0, 0, 500_000), "2024-01-31 10:00:00.5"),
        (pd.Timedelta("1 days 00:00:00.5"), "1 days 00:00:00.5"), (datetime.timedelta(hours=1), "0 days 01:00:00"),
        ("2024-01-31T00:00:00.000", "2024-01-31"), ("2024-01-31T10:00:00.500", "2024-01-31 10:00:00.5"),
        ("2024-01-31T10:00:00Z", "2024-01-31 10:00:00+00:00"),
        (np.timedelta64(90, "s"), "0 days 00:01:30"), (np.timedelta64("NaT"), None),
        (datetime.date(2024, 1, 31), "2024-01-31"), (np.datetime64("2024-01-31T10:00:00.000000000"), "2024-01-31 10:00:00"),
    ],
)  # fmt: skip
def test_a_value_in_python_has_the_text_it_has_in_a_file(value, text):
    assert cell_text(value) == text
    assert type(text) is type(cell_text(value))


# What is missing


def test_a_class_and_a_word_that_look_like_missing_are_kept_and_noted(tmp_path):
    path = written(tmp_path, "image,text,label\na,nan,Nan\nb,NA,NaN\n,t,x\n")
    table, issues, notes = read_all(path, ("image", "text"))
    assert (table.inputs["text"], table.labels, issues) == (["nan", "NA", "t"], ["Nan", "NaN", "x"], [])
    assert any('--data.format.missing=\'["NA","nan"]\'' in note for note in notes)
    assert any("1 cells of column 'label'" in note for note in notes)


@pytest.mark.parametrize("name", ["m.csv", "m.parquet"])
def test_further_spellings_of_missing_hold_for_every_column(tmp_path, name):
    frame = pd.DataFrame(
        {"text": ["N/A", "t", "u"], "label": ["x", " N/A", "y"], "group": ["N/A", "g", "h"], "split": "N/A", "id": ["N/A", "b", "c"]}
    )
    FORMATS[name](frame.assign(age=[3, -1, 4]), tmp_path / name)
    table, issues, notes = read_all(tmp_path / name, missing=("N/A", "-1.0"))
    assert issues == [(2 if name == "m.csv" else 1, "no text"), (3 if name == "m.csv" else 2, "label is missing")]
    assert (table.splits, table.groups, table.extra["age"], notes) == ([None], ["h"], ["4"], [])
    table, _, _ = read_all(tmp_path / name, missing=("N/A", "-1.0"), need_label=False)
    assert (table.labels, table.extra["age"]) == ([None, "y"], ["", "4"])


# Columns that are not meant as their names say


def test_an_id_a_group_and_a_split_that_are_not_meant_as_such_can_be_left_out(tmp_path):
    path = written(tmp_path, "text,label,id,split,group\nt,x,7,left,one\nu,y,7,right,one\n")
    for role in ("id", "split"):
        others = {other: None for other in ("id", "split") if other != role}
        with pytest.raises(UserError, match=rf"--data.columns.{role}=null"):
            read_all(path, columns=Columns(**others))
    table, issues, _ = read_all(path, columns=Columns(id=None, split=None, group=None))
    assert (table.ids, table.splits, table.groups, issues) == (["2", "3"], [None, None], [None, None], [])
    assert table.extra == {"id": ["7", "7"], "split": ["left", "right"], "group": ["one", "one"]}
