"""Any table that pandas writes is read back the same from every format, as far as the format can hold it.

What pandas and the formats cannot hold, and so is left out here:
- CSV and TSV have no empty text beside the missing one; in every format a blank text counts as missing.
- pandas does not quote a cell for a carriage return alone, which ends a line: it is written to none of the formats.
- TSV as pandas writes it encloses cells that hold quotes, tabs or line breaks, and needs --data.format.quotes=true.
- JSON Lines of pandas rounds floats to 10 decimals (15 at most), drops the sign of zero, and turns infinities into nulls and times into
  whole numbers (or, by date_format="iso", into text with a T, which is left alone): floats have few digits here; times and narrow floats
  are in test_cell_text.py, without JSON.
- Durations are whole numbers in pandas' JSON; they too are in test_cell_text.py.
"""

import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import read_all

WORDS = st.sampled_from(
    ["nan", "NA", "true", "True", "1.0", "None", "null", '"', '""', '"a', "a\tb", "a\nb", "a\r\nb", "a,b\nc,d", "x;y|z", "-0.0", "~"]
)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), max_size=12)
CELLS = st.one_of(st.none(), WORDS, TEXT)
FLOATS = st.integers(-(10**9), 10**9).map(lambda i: i / 1000)
COLUMNS = {
    "text": (CELLS, "object"),
    "whole": (st.integers(-(2**53), 2**53), "int64"),
    "whole or missing": (st.none() | st.integers(-(2**53), 2**53), "Int64"),
    "float or missing": (st.none() | FLOATS, "float64"),
    "boolean": (st.booleans(), "bool"),
    "boolean or missing": (st.none() | st.booleans(), "boolean"),
    "category": (CELLS, "category"),
}


@st.composite
def tables(draw):
    """Columns of Python values, and the frame that holds them; the last row has a text, lest no sample is usable."""
    count = draw(st.integers(1, 6))
    texts = [*draw(st.lists(CELLS, min_size=count, max_size=count)), "one more"]
    values, series = {"text": texts}, {"text": pd.Series(texts, dtype="object")}
    for name in ("label", "group", "note"):
        cells, dtype = COLUMNS[draw(st.sampled_from(sorted(COLUMNS)))]
        values[name] = draw(st.lists(cells, min_size=count + 1, max_size=count + 1))
        series[name] = pd.Series(values[name], dtype=dtype)
    return values, pd.DataFrame(series)


def expected(value):
    if value is None or isinstance(value, bool):
        return {None: "", True: "True", False: "False"}[value]
    if isinstance(value, float) and value == int(value):
        return str(int(value))
    whole, dot, fraction = str(value).partition(".")
    is_whole = dot and whole.isascii() and whole.removeprefix("-").isdigit() and fraction and not fraction.strip("0")
    return "0" if is_whole and whole == "-0" else whole if is_whole else str(value)


def expected_name(value):
    """Of a label or group, which is taken without blanks around."""
    return expected(value.strip() if isinstance(value, str) else value) or None


def write(frame, folder):
    """The frame in every format; gives the options to read each."""
    frame.to_csv(folder / "m.csv", index=False)
    frame.to_csv(folder / "m.tsv", index=False, sep="\t")
    frame.to_csv(folder / "m.csv.gz", index=False, sep=";")
    frame.to_json(folder / "m.jsonl", orient="records", lines=True)
    frame.to_parquet(folder / "m.parquet", index=False)
    return {"m.csv": {}, "m.tsv": {"quotes": True}, "m.csv.gz": {}, "m.jsonl": {}, "m.parquet": {}}


@settings(max_examples=150)
@given(tables())
def test_a_table_of_pandas_is_read_back_the_same_from_every_format(tmp_path_factory, drawn):
    values, frame = drawn
    kept = [i for i, text in enumerate(values["text"]) if text and not text.isspace()]
    folder = tmp_path_factory.mktemp("table")
    for name, options in write(frame, folder).items():
        table, issues, _ = read_all(folder / name, need_label=False, **options)
        assert [reason for _, reason in issues] == ["no text"] * (len(frame) - len(kept)), name
        assert table.inputs["text"] == [expected(values["text"][i]) for i in kept], name
        assert table.labels == [expected_name(values["label"][i]) for i in kept], name
        assert table.groups == [expected_name(values["group"][i]) for i in kept], name
        assert table.extra == {"note": [expected(values["note"][i]) for i in kept]}, name
