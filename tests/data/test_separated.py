"""CSV and TSV as they are found: other separators, quotes that enclose or don't, other encodings, compressed."""

import csv
import gzip
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reading import read_all, written

from fusion.data.format import Format
from fusion.data.separated import read_separated
from fusion.errors import UserError


def refusal(path, **options):
    with pytest.raises(UserError) as caught:
        read_all(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What Arrow reads of it and what Python's reader does, together as Python's reader alone


def read_line_by_line(raw, separator, quotes, names):
    """(line, cells) of the rows and (line, whether it is the quotes) of what is none, a line given up where its quotes aren't closed."""
    lines = list(io.StringIO(raw.decode(errors="surrogateescape"), newline=""))
    at, rows, malformed = 1, [], []
    while at < len(lines):
        reader = csv.reader(lines[at:], delimiter=separator, strict=quotes, quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE)
        try:
            cells = next(reader)
        except csv.Error:
            malformed.append((at + 1, True))
            at += 1
            continue
        if len(cells) == len(names):
            rows.append((at + 1, [cell.encode(errors="backslashreplace").decode() for cell in cells]))
        elif len(cells) > 1 or any(cell.strip() for cell in cells):
            malformed.append((at + 1, False))
        at += reader.line_num
    return rows, malformed


PIECES = [
    "a",
    "é",
    "\u2028",
    " ",
    '"',
    '""',
    '"x,y"',
    '"x\ny"',
    "\n",
    "\r\n",
    "\r",
    "\0",
    ",",
    ";",
    "\t",
    "\\",
    "a,b\n",
    '"a","b"\n',
    b"\xff",
    b"\xed\xa0\x80",
]


@given(st.lists(st.sampled_from(PIECES), max_size=40), st.integers(1, 3), st.sampled_from([",", ";", "\t", "§"]), st.booleans())
def test_any_file_is_read_as_by_pythons_reader_line_by_line(tmp_path_factory, pieces, count, separator, quotes):
    names = ["one" + "-" * 64, "two", "three"][:count]  # what looks like UTF-16 is told by the first 64 bytes
    raw = b"".join(piece if isinstance(piece, bytes) else piece.encode() for piece in pieces)
    path = tmp_path_factory.mktemp("any") / "m.csv"
    path.write_bytes(f"{separator.join(names)}\n".encode() + raw)
    found = read_separated(str(path), Format(separator=separator, quotes=quotes), ",")
    rows, malformed = read_line_by_line(path.read_bytes(), separator, quotes, names)
    assert list(found.rows) == [line for line, _ in rows]
    assert {name: list(found.columns[name]) for name in names} == {name: [row[i] for _, row in rows] for i, name in enumerate(names)}
    assert [(line, reason.startswith("quotes are")) for line, reason in sorted(found.malformed)] == malformed
    undecodable = {i for i, (_, row) in enumerate(rows) if any("\\udc" in cell for cell in row)}
    assert set(found.flawed) == undecodable


def test_a_block_of_the_file_may_end_within_a_line_break_and_a_line_may_be_longer_than_a_block(tmp_path):
    long = "x" * (2**20 - len("text,label\r\n,y\r"))
    path = written(tmp_path, f"text,label\r\n{long},y\r\nb,z\r\n{long * 3},w\r\n")
    table, issues, _ = read_all(path)
    assert (list(table.rows), table.labels, issues) == ([2, 3, 4], ["y", "z", "w"], [])
    assert [len(text) for text in table.inputs["text"]] == [len(long), 1, 3 * len(long)]


# Quotes


def test_lines_of_a_tsv_with_one_bare_quote_each_stay_two_samples(tmp_path):
    path = written(tmp_path, 'id\ttext\tlabel\na\t"5 inch\tx\nb\tpipe"\ty\nc\t6" board\tz\n', "m.tsv")
    table, issues, notes = read_all(path)
    assert (table.inputs["text"], table.labels, issues) == (['"5 inch', 'pipe"', '6" board'], ["x", "y", "z"], [])
    assert len(notes) == 1
    assert "row 2 has" in notes[0]


def test_cells_of_a_tsv_that_look_enclosed_are_noted_with_the_option_that_reads_them(tmp_path):
    path = written(tmp_path, 'text\tlabel\n"a ""q"" b"\tx\nplain\ty\n"two\nlines"\tz\n"tab\there"\tw\n', "m.tsv")
    table, issues, notes = read_all(path)
    assert table.inputs["text"][:2] == ['"a ""q"" b"', "plain"]
    assert [row for row, _ in issues] == [4, 6]
    assert all("--data.format.quotes=true" in reason for _, reason in issues[1:])
    assert "--data.format.quotes=true" in notes[0]
    table, issues, notes = read_all(path, quotes=True)
    assert (table.inputs["text"], table.labels, issues, notes) == (
        ['a "q" b', "plain", "two\nlines", "tab\there"],
        ["x", "y", "z", "w"],
        [],
        [],
    )


def test_quotes_around_the_names_of_a_tsv_show_that_they_enclose_its_cells(tmp_path):
    path = written(tmp_path, '"text"\t"label"\n"two\twords"\t"x"\n', "m.tsv")
    table, issues, notes = read_all(path)
    assert (table.inputs["text"], table.labels, issues) == (["two\twords"], ["x"], [])
    assert "--data.format.quotes=false" in notes[0]
    assert "no column 'text'" in refusal(path, quotes=False)


def test_a_cell_that_swallowed_a_row_is_noted_by_its_row_and_the_sample_kept(tmp_path):
    content = 'image,text,label\na,t,x\nb,"5 inch,y\nc,pipe",z\nd,"one, two\nthree, four, five",w\n'
    table, issues, notes = read_all(written(tmp_path, content))
    assert (table.labels, issues) == (["x", "z", "w"], [])
    (note,) = notes
    assert "row 3 has" in note
    assert "--data.format.quotes=false" in note
    assert read_all(written(tmp_path, content), quotes=False)[0].labels[:3] == ["x", "y", "z"]


# Separators


@pytest.mark.parametrize(("separator", "name"), [(";", "m.csv"), ("\t", "m.csv"), ("|", "m.csv"), (",", "m.tsv"), (";", "m.csv.gz")])
def test_a_separator_that_the_header_alone_shows_is_recognised_and_noted(tmp_path, separator, name):
    content = "image;text;label\na;one, two;x\n".replace(";", separator) if separator != "," else "image,text,label\na,one two,x\n"
    table, issues, notes = read_all(written(tmp_path, content, name, compressed=name.endswith("gz")))
    assert (table.inputs["text"], issues) == (["one two" if separator == "," else "one, two"], [])
    (note,) = notes
    assert "separated by" in note


def test_a_header_that_leaves_doubt_is_not_guessed_but_the_options_are_named(tmp_path):
    path = written(tmp_path, "image;text|label\na;t|x\n")
    message = refusal(path)
    assert "--data.format.separator=';' or --data.format.separator='|'" in message
    assert "--data.format.separator=';'" in refusal(written(tmp_path, "image,text;label\na,t;x\n"))


def test_a_separator_may_be_given_also_a_tab_as_a_shell_writes_it(tmp_path):
    assert read_all(written(tmp_path, "text^label\nt^x\n"), separator="^")[0].labels == ["x"]
    assert read_all(written(tmp_path, "text\tlabel,b\nt\tx\n"), columns=None, separator="\\t", need_label=False)[0].inputs["text"] == ["t"]


@pytest.mark.parametrize("wrong", [{"separator": ";;"}, {"separator": '"'}, {"separator": ""}, {"encoding": "utf-9"}, {"encoding": "hex"}])
def test_a_format_that_cannot_be_is_refused(wrong):
    (option,) = wrong
    with pytest.raises(UserError, match=f"data.format.{option}"):
        Format(**wrong)


# Encodings and compression


@pytest.mark.parametrize("name", ["m.csv", "m.tsv", "m.jsonl"])
@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-16", "utf-16-le"])
def test_another_encoding_is_never_guessed_and_read_if_named(tmp_path, name, encoding):
    content = {"m.csv": "text,label\ncafé,x\n", "m.tsv": "text\tlabel\ncafé\tx\n", "m.jsonl": '{"text": "café", "label": "x"}\n'}[name]
    path = written(tmp_path, content, name, encoding=encoding)
    option = f"--data.format.encoding={encoding if encoding.startswith('utf') else 'cp1252'}"
    assert option in refusal(path)
    assert read_all(path, encoding=encoding)[0].inputs["text"] == ["café"]


def test_an_encoding_that_is_wrong_for_the_file_is_refused_or_costs_the_row(tmp_path):
    path = written(tmp_path, "text,label\ncafé,x\nt,y\n")
    assert read_all(path, encoding="ascii")[1] == [(2, "not ascii (byte 0xc3 in column text)")]
    assert "not utf-16" in refusal(path, encoding="utf-16")


def test_a_header_in_another_encoding_names_the_option(tmp_path):
    assert "--data.format.encoding=cp1252" in refusal(written(tmp_path, "text,label,größe\nt,x,1\n", encoding="cp1252"))


@pytest.mark.parametrize("name", ["m.csv.gz", "m.csv", "M.CSV.GZ"])
def test_a_compressed_file_is_read_by_its_first_bytes(tmp_path, name):
    table, issues, _ = read_all(written(tmp_path, "text,label\none,x\n", name, compressed=True))
    assert (table.inputs["text"], issues) == (["one"], [])


def test_the_other_text_formats_may_be_compressed_and_a_gz_name_may_be_wrong(tmp_path):
    assert read_all(written(tmp_path, "text\tlabel\none\tx\n", "m.tsv.gz", compressed=True))[0].inputs["text"] == ["one"]
    assert read_all(written(tmp_path, '{"text": "one", "label": "x"}\n', "m.jsonl.gz", compressed=True))[0].inputs["text"] == ["one"]
    assert read_all(written(tmp_path, "text,label\none,x\n", "m.csv.gz"))[0].inputs["text"] == ["one"]


def test_a_compressed_file_cut_short_or_corrupt_is_refused(tmp_path):
    whole = gzip.compress(b"text,label\n" + b"".join(b"text %d,x\n" % i for i in range(1000)))
    assert "gzip" in refusal(written(tmp_path, whole[:-20], "m.csv.gz"))
    corrupt = bytearray(whole)
    corrupt[60] ^= 255
    assert refusal(written(tmp_path, bytes(corrupt), "m.csv.gz"))
    assert "gunzip" in refusal(written(tmp_path, "", "m.parquet.gz"))


def test_a_workbook_named_csv_is_refused_by_what_it_is(tmp_path):
    assert "Excel" in refusal(written(tmp_path, b"PK\x03\x04" + b"\0" * 100))
    assert "name it .parquet" in refusal(written(tmp_path, b"PAR1" + b"\0" * 100))


def test_blank_lines_before_the_header_are_skipped(tmp_path):
    (tmp_path / "m.csv").write_text("   \n\nid,text,label\na,one,x\nb,two,y\n")
    table, _, _ = read_all(tmp_path / "m.csv")
    assert table.inputs["text"] == ["one", "two"]


def test_one_spelling_of_missing_needs_no_list():
    assert Format(missing="nan") == Format(missing=("nan",))
