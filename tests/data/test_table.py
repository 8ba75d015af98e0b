"""Manifests read into columns."""

import csv
import json
import os
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reading import usual_inputs

from fusion.data import text_file
from fusion.data.format import Format
from fusion.data.issues import DataIssues
from fusion.data.table import Columns, Table, read_table
from fusion.errors import UserError
from fusion.tasks import Classification

BOTH = ("image", "text")
CP1252 = "; if it is 'é', read the file by --data.format.encoding=cp1252"
HEADER = "image,text,label\n"


QUOTES = Format(quotes=True)


def read(path, modalities=BOTH, *, columns=None, need_label=True, split=None, issues=None, format=None):
    columns, issues = columns or Columns(), issues or DataIssues("drop")
    return read_table(
        path,
        columns,
        usual_inputs(columns, modalities),
        task=Classification() if need_label else None,
        issues=issues,
        split=split,
        format=format or Format(),
    )


def manifest(folder, content, name="m.csv"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def with_issues(path, modalities=BOTH, **options):
    issues = DataIssues("drop")
    return read(path, modalities, issues=issues, **options), [(issue.row, issue.id, issue.reason) for issue in issues.dropped]


def refusal(path, modalities=BOTH, **options):
    with pytest.raises(UserError) as caught:
        read(path, modalities, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# What is read.


def test_every_column_arrives_in_its_place(tmp_path):
    path = manifest(tmp_path, "kind,group,image,text,label,split,id\nk,g,a/b.png,what?,yes,train,one\n,,/abs/c.png,who?,no,,two\n")
    found = read(path)
    assert found.inputs["image"] == [os.path.join(tmp_path, "a/b.png"), "/abs/c.png"]
    assert found.inputs["text"] == ["what?", "who?"]
    assert found.labels == ["yes", "no"]
    assert found.splits == ["train", None]
    assert found.ids == ["one", "two"]
    assert found.groups == ["g", None]
    assert found.rows == [2, 3]
    assert found.files == [str(path)] * 2
    assert found.extra == {"kind": ["k", ""]}


def test_image_paths_are_absolute_even_for_a_manifest_named_from_here(tmp_path, monkeypatch):
    manifest(tmp_path, HEADER + "a.png,t,x\n")
    monkeypatch.chdir(tmp_path)
    assert read("m.csv").inputs["image"] == [os.path.join(os.getcwd(), "a.png")]


def test_all_formats_give_the_same_table(tmp_path):
    rows = [
        {"image": "a.png", "text": 'naïve, 日本 "q"\n2', "label": "yes", "split": "train", "id": "1", "group": "g", "kind": "k"},
        {"image": "", "text": "t", "label": "no", "split": "dev", "id": "2", "group": "", "kind": ""},
    ]
    with open(tmp_path / "m.csv", "w", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, rows[0]).writeheader()
        csv.DictWriter(file, rows[0]).writerows(rows)
    with open(tmp_path / "m.tsv", "w", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, rows[0], delimiter="\t").writeheader()
        csv.DictWriter(file, rows[0], delimiter="\t").writerows(rows)
    for name in ("m.jsonl", "m.NDJSON"):
        manifest(tmp_path, "\n".join(json.dumps(row) for row in rows), name)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    tables = {name: read(tmp_path / name, format=QUOTES) for name in ("m.csv", "m.tsv", "m.jsonl", "m.NDJSON", "m.parquet")}
    for name, found in tables.items():
        for column in ("inputs", "labels", "splits", "ids", "groups", "extra"):
            assert getattr(found, column) == getattr(tables["m.csv"], column), (name, column)
    assert {name: found.rows for name, found in tables.items()} == {
        "m.csv": [2, 4], "m.tsv": [2, 4], "m.jsonl": [1, 2], "m.NDJSON": [1, 2], "m.parquet": [1, 2],
    }  # fmt: skip


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(lambda text: not text.isspace())


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=8))
def test_any_text_survives_the_way_through_csv(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("csv")
    for name, delimiter in (("m.csv", ","), ("m.tsv", "\t")):
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter=delimiter).writerows([["text", "label", "note"], *([text, "x", note] for text, note in rows)])
        found, issues = with_issues(folder / name, ("text",), format=QUOTES)
        assert issues == []
        assert found.inputs["text"] == [text for text, _ in rows]
        assert found.extra["note"] == [note for _, note in rows]


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=8))
def test_any_text_survives_the_way_through_json_lines(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("jsonl") / "m.jsonl"
    path.write_text("\n".join(json.dumps({"text": t, "label": "x", "note": n}) for t, n in rows), encoding="utf-8")
    found = read(path, ("text",))
    assert found.inputs["text"] == [text for text, _ in rows]
    assert found.extra["note"] == [note for _, note in rows]


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path):
    assert read(manifest(tmp_path, b"\xef\xbb\xbf" + (HEADER + "a,t,x\n").encode())).inputs["text"] == ["t"]
    assert read(manifest(tmp_path, b"\xef\xbb\xbf" + b'{"text": "t", "label": "x"}', "m.jsonl"), ("text",)).inputs["text"] == ["t"]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_any_line_ending_will_do_and_blank_lines_are_no_rows(tmp_path, newline):
    path = manifest(tmp_path, newline.join(["", "image,text,label", "a,t,x", "", "  ", "b,u,y", ""]))
    found, issues = with_issues(path)
    assert found.inputs["text"] == ["t", "u"]
    assert found.rows == [3, 6]
    assert issues == []


def test_rows_are_the_lines_where_they_begin_though_cells_hold_line_breaks(tmp_path):
    found = read(manifest(tmp_path, HEADER + 'a,"one\ntwo\nthree",x\nb,u,y\n'))
    assert found.inputs["text"] == ["one\ntwo\nthree", "u"]
    assert found.rows == [2, 5]


def test_a_cell_may_be_longer_than_the_csv_module_allows_by_default(tmp_path):
    long = "word " * 60_000
    assert read(manifest(tmp_path, HEADER + f"a,{long},x\n")).inputs["text"] == [long]


def test_nul_bytes_do_not_crash(tmp_path):
    assert read(manifest(tmp_path, HEADER + "a,t\0t,x\n")).inputs["text"] == ["t\0t"]


def test_names_of_columns_may_have_blanks_around_and_one_may_be_empty(tmp_path):
    found = read(manifest(tmp_path, ", image , text,label\n0,a,t,x\n"))
    assert found.inputs["text"] == ["t"]
    assert found.extra == {}


def test_renamed_columns_are_read_and_one_column_may_have_two_roles(tmp_path):
    path = manifest(tmp_path, "img,question,answer\na.png,t,x\n")
    found = read(path, columns=Columns(image="img", text="question", label="answer", group="img"))
    assert (found.inputs["image"], found.inputs["text"], found.labels, found.groups) == ([str(tmp_path / "a.png")], ["t"], ["x"], ["a.png"])


# Missing modalities and labels.


def test_an_empty_cell_means_that_the_sample_lacks_the_modality(tmp_path):
    found, issues = with_issues(manifest(tmp_path, HEADER + ",t,x\n  ,t,x\na,,x\na, \t,x\n"))
    assert [image is None for image in found.inputs["image"]] == [True, True, False, False]
    assert found.inputs["text"] == ["t", "t", None, None]
    assert issues == []


def test_null_and_nan_mean_it_too_in_json_and_parquet(tmp_path):
    path = manifest(tmp_path, '{"image": null, "text": "t", "label": "x"}\n{"image": "a", "text": NaN, "label": "x"}\n', "m.jsonl")
    assert [image is None for image in read(path).inputs["image"]] == [True, False]
    assert read(path).inputs["text"] == ["t", None]
    pq.write_table(pa.table({"image": [None, "a"], "text": ["t", None], "label": ["x", "y"]}), tmp_path / "m.parquet")
    assert read(tmp_path / "m.parquet").inputs["text"] == ["t", None]


def test_a_sample_without_any_wanted_modality_goes_to_the_ledger(tmp_path):
    path = manifest(tmp_path, "image,text,label,id\n,,x,one\na,,x,two\n,t,x,three\n")
    assert with_issues(path)[1] == [(2, "one", "no image and no text")]
    assert with_issues(path, ("text",))[1] == [(2, "one", "no text"), (3, "two", "no text")]
    assert with_issues(path, ("image",))[1] == [(2, "one", "no image"), (4, "three", "no image")]


@pytest.mark.parametrize(("wanted", "other"), [("text", "image"), ("image", "text")])
def test_a_modality_that_is_not_wanted_is_neither_needed_nor_read(tmp_path, wanted, other):
    assert list(read(manifest(tmp_path, f"{wanted},label\nt,x\n"), (wanted,)).inputs) == [wanted]
    found = read(manifest(tmp_path, HEADER + "a,t,x\n"), (wanted,))
    assert list(found.inputs) == [wanted]
    assert found.extra == {other: ["a" if other == "image" else "t"]}  # as any column of the file: to choose rows by


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"text": "t", "label": "x"}]', "is a JSON array; expected one object per line"),
        ('\n[\n{"text": "t", "label": "x"},\n{"text": "u", "label": "y"}\n]', "is a JSON array; expected one object per line"),
        ("text,label\nt,x\nu,y\n", "has no line that is a JSON object; the first: row 1: not JSON"),
        ("[1]\n", "is a JSON array"),
    ],
    ids=["one line", "pretty", "csv", "list"],
)
def test_a_file_of_another_kind_that_is_named_jsonl_is_rejected_as_that(tmp_path, content, words):
    with pytest.raises(UserError, match=words):
        read(manifest(tmp_path, content, "m.jsonl"), ("text",))


def test_labels_are_stripped_text_and_missing_ones_go_to_the_ledger(tmp_path):
    path = manifest(tmp_path, HEADER + "a,t, yes \na,t,\na,t,  \na,t,\na,t,none\n")
    found, issues = with_issues(path)
    assert found.labels == ["yes", "none"]
    assert issues == [(row, str(row), "label is missing") for row in (3, 4, 5)]
    assert read(path, need_label=False).labels == ["yes", None, None, None, "none"]


def test_numbers_and_truth_values_become_the_same_text_from_json_and_parquet(tmp_path):
    for name, values, expected in (
        ("ints", [3, -1], ["3", "-1"]),
        ("floats", [3.0, 0.5], ["3", "0.5"]),
        ("bools", [True, False], ["True", "False"]),
    ):
        path = manifest(tmp_path, "\n".join(json.dumps({"text": "t", "label": value}) for value in values), f"{name}.jsonl")
        assert read(path, ("text",)).labels == expected
        pq.write_table(pa.table({"text": ["t", "t"], "label": values}), tmp_path / f"{name}.parquet")
        assert read(tmp_path / f"{name}.parquet", ("text",)).labels == expected


def test_equal_values_of_different_kinds_keep_their_own_texts(tmp_path):
    path = manifest(tmp_path, "\n".join(json.dumps({"text": "t", "label": label}) for label in (1, True, 1.0, "1", None)), "m.jsonl")
    assert read(path, ("text",), need_label=False).labels == ["1", "True", "1", "1", None]


def test_parquet_categories_times_and_int_columns_with_nulls_are_read(tmp_path):
    table = pa.table(
        {
            "text": pa.array(["t", "u"]).dictionary_encode(),
            "label": pa.array([1, None], pa.int64()),
            "when": pa.array([1, 1_500_000_001], pa.timestamp("ns")),
            "boxes": [[1, 2], [3]],
        }
    )
    pq.write_table(table, tmp_path / "m.parquet")
    found = read(tmp_path / "m.parquet", ("text",), need_label=False)
    assert (found.inputs["text"], found.labels) == (["t", "u"], ["1", None])
    assert found.extra == {"when": ["1970-01-01 00:00:00.000000001", "1970-01-01 00:00:01.500000001"]}


def test_folders_named_like_partitions_add_no_columns(tmp_path):
    folder = tmp_path / "label=7"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["t"], "label": ["x"]}), folder / "m.parquet")
    assert read(folder / "m.parquet", ("text",)).labels == ["x"]


# Bad rows.


def test_one_undecodable_row_does_not_cost_the_file(tmp_path):
    path = manifest(tmp_path, b"image,text,label,id\na,caf\xe9,x,one\nb,caf\xc3\xa9,y,two\n")
    found, issues = with_issues(path)
    assert found.inputs["text"] == ["café"]
    assert issues == [(2, "one", f"not UTF-8 (byte 0xe9 in column text{CP1252})")]


def test_an_undecodable_line_of_json_and_a_cell_of_parquet_are_named_alike(tmp_path):
    path = manifest(tmp_path, b'{"text": "caf\xe9", "label": "x", "id": "one"}\n{"text": "t", "label": "x", "id": "two"}\n', "m.jsonl")
    assert with_issues(path, ("text",))[1] == [(1, "one", f"not UTF-8 (byte 0xe9 in column text{CP1252})")]
    broken = pa.Array.from_buffers(pa.string(), 2, [None, pa.array([0, 4, 5], pa.int32()).buffers()[1], pa.py_buffer(b"caf\xe9t")])
    pq.write_table(pa.table({"text": broken, "label": ["x", "x"]}), tmp_path / "m.parquet")
    found, issues = with_issues(tmp_path / "m.parquet", ("text",))
    assert found.inputs["text"] == ["t"]
    assert issues == [(1, "1", "not UTF-8 (byte 0xe9 in column text)")]


def test_a_lone_surrogate_in_json_goes_to_the_ledger_and_a_pair_is_read(tmp_path):
    path = manifest(tmp_path, '{"text": "\\ud83d\\ude00", "label": "x"}\n{"text": "\\uD83D", "label": "x"}\n', "m.jsonl")
    found, issues = with_issues(path, ("text",))
    assert found.inputs["text"] == ["😀"]
    assert issues == [(2, "2", "not UTF-8 (lone surrogate U+D83D in column text)")]


def test_rows_with_too_many_or_too_few_cells_go_to_the_ledger(tmp_path):
    found, issues = with_issues(manifest(tmp_path, HEADER + "a,t,x\na,t\na,t,x,y,z\nb,u,y\n"))
    assert found.inputs["text"] == ["t", "u"]
    assert issues == [(3, "", "wrong number of cells (2 cells, expected 3)"), (4, "", "wrong number of cells (5 cells, expected 3)")]


@pytest.mark.parametrize("tail", ["", 'd,"quoted, too",w\n'])
def test_a_quote_that_is_never_closed_costs_only_its_own_row(tmp_path, tail):
    found, issues = with_issues(manifest(tmp_path, HEADER + 'a,t,x\nb,"oops,y\nc,"two\nlines",z\n' + tail))
    assert found.inputs["text"] == ["t", "two\nlines", *(["quoted, too"] if tail else [])]
    assert found.rows[:2] == [2, 4]
    assert [(row, reason.partition(" (")[0]) for row, _, reason in issues] == [(3, "quotes are not closed or not doubled")]


def test_backslashes_before_quotes_are_refused_rather_than_read_wrongly(tmp_path):
    found, issues = with_issues(manifest(tmp_path, HEADER + 'a,"he said \\"hi\\" to me",x\nb,t,y\n'))
    assert found.inputs["text"] == ["t"]
    assert [row for row, _, _ in issues] == [2]


def test_lines_that_are_no_json_objects_go_to_the_ledger(tmp_path):
    bad = ["{", '["a"]', "7", "[" * 100_000, '{"text": ' + "1" * 5000 + "}", '{"text": ["t"], "label": "x", "id": "b"}']
    found, issues = with_issues(manifest(tmp_path, "\n".join(['{"text": "t", "label": "x"}', *bad]), "m.jsonl"), ("text",))
    assert found.inputs["text"] == ["t"]
    assert [row for row, _, _ in issues] == [2, 3, 4, 5, 6, 7]
    assert issues[0][2].startswith("not JSON (")
    assert issues[1][2] == issues[2][2] == "not a JSON object"
    assert issues[-1] == (7, "b", "column text holds a list, expected text")


def test_keys_may_differ_from_line_to_line(tmp_path):
    found = read(manifest(tmp_path, '{"text": "t", "label": "x"}\n{"text": "u", "label": "y", "kind": "k"}\n', "m.jsonl"), ("text",))
    assert found.extra == {"kind": ["", "k"]}


def test_issues_come_in_the_order_of_the_file(tmp_path):
    _, issues = with_issues(manifest(tmp_path, HEADER + "a,t,\nb\n,,x\na,t,x\n"))
    assert [row for row, _, _ in issues] == [2, 3, 4]


def test_a_strict_ledger_stops_at_the_first_bad_row_of_the_file(tmp_path):
    with pytest.raises(UserError, match="row 2, id '2': label is missing"):
        read(manifest(tmp_path, HEADER + "a,t,\nb\na,t,x\n"), issues=DataIssues("error"))


def test_a_file_mostly_of_bad_rows_still_gives_the_good_ones(tmp_path):
    found, issues = with_issues(manifest(tmp_path, HEADER + "b\n" * 9 + "a,t,x\n"))
    assert len(found) == 1
    assert len(issues) == 9


# Files that are refused.


def test_without_any_usable_row_the_first_reasons_are_told(tmp_path):
    message = refusal(manifest(tmp_path, HEADER + "a,t,\nb\na,t,\na,t,\n"))
    for part in ("4 rows", "row 2: label is missing", "row 3: wrong number of cells"):
        assert part in message
    assert "row 5" not in message


@pytest.mark.parametrize("content", ["", HEADER, HEADER.strip(), "\n\n", HEADER + "\n\n"])
def test_a_file_without_rows_is_refused(tmp_path, content):
    assert "has no rows" in refusal(manifest(tmp_path, content))


def test_empty_json_lines_and_parquet_are_refused_alike(tmp_path):
    assert "has no rows" in refusal(manifest(tmp_path, "\n", "m.jsonl"))
    pq.write_table(pa.table({"image": pa.array([], pa.string())}), tmp_path / "m.parquet")
    assert "has no rows" in refusal(tmp_path / "m.parquet")


def test_a_missing_file_is_told_with_the_nearest_in_its_folder(tmp_path):
    manifest(tmp_path, HEADER, "manifest.csv")
    assert "Did you mean manifest.csv?" in refusal(tmp_path / "manifets.csv")
    assert f"there is no folder {tmp_path / 'nowhere'}" in refusal(tmp_path / "nowhere" / "m.csv")


def test_a_folder_and_an_unknown_suffix_are_refused_with_what_was_expected(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    assert "is a folder" in refusal(tmp_path / "folder.csv")
    for name in ("m.xlsx", "m"):
        assert "expected .csv, .tsv, .jsonl, .ndjson, .parquet" in refusal(manifest(tmp_path, HEADER, name))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"nonsense" * 100, b"PAR1" + b"\0" * 100 + b"PAR1"])
def test_a_broken_parquet_file_is_refused(tmp_path, content):
    assert refusal(manifest(tmp_path, content, "m.parquet"))


def test_a_parquet_file_cut_short_is_refused(tmp_path):
    pq.write_table(pa.table({"text": ["t"] * 1000, "label": ["x"] * 1000}), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    for length in (len(whole) // 2, len(whole) - 5):
        assert refusal(manifest(tmp_path, whole[:length], "m.parquet"))


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    def denied(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    path = manifest(tmp_path, HEADER)
    monkeypatch.setattr(text_file, "open", denied, raising=False)
    assert "Permission denied" in refusal(path)


def test_a_header_that_is_not_utf8_or_names_a_column_twice_is_refused(tmp_path):
    assert "UTF-16" in refusal(manifest(tmp_path, HEADER.encode("utf-16")))
    assert "more than one column 'text'" in refusal(manifest(tmp_path, "text,label,text\nt,x,t\n"))
    assert "can't read its header" in refusal(manifest(tmp_path, 'text,"label\nt,x\n'))


def test_a_missing_column_is_told_with_the_file_its_columns_and_the_ways_out(tmp_path):
    message = refusal(manifest(tmp_path, "images,text,label\na,t,x\n"))
    ways_out = ("--data.columns.image=NAME", "--model.modalities=[text]")
    for part in ("no column 'image'", "Did you mean images?", "'images', 'text', 'label'", *ways_out):
        assert part in message


def test_all_missing_columns_are_told_at_once(tmp_path):
    message = refusal(manifest(tmp_path, "a;b;c\na;t;x\n"))
    for part in ("'image'", "'text'", "'label'", "--data.columns.label=NAME", "'a', 'b', 'c'"):
        assert part in message


def test_the_only_modality_has_no_way_out_through_the_other(tmp_path):
    assert "modalities" not in refusal(manifest(tmp_path, "image,label\na,x\n"), ("text",))


def test_an_optional_column_may_be_missing_unless_it_was_renamed(tmp_path):
    path = manifest(tmp_path, HEADER + "a,t,x\n")
    found = read(path)
    assert (found.splits, found.groups, found.ids) == ([None], [None], ["2"])
    for role in ("split", "id", "group"):
        assert f"--data.columns.{role}=NAME" in refusal(path, columns=Columns(**{role: "mine"}))


def test_to_predict_nothing_but_the_inputs_is_needed(tmp_path):
    path = manifest(tmp_path, "image,text\na,t\n")
    found = read(path, columns=Columns(label="answer", group="patient", split="fold"), need_label=False)
    assert found.labels == [None]


def test_structs_that_are_no_pictures_are_refused_by_their_type(tmp_path):
    pq.write_table(pa.table({"image": [{"pixels": b"x", "path": "a"}], "text": ["t"], "label": ["x"]}), tmp_path / "m.parquet")
    assert "struct<pixels: binary, path: string> in column 'image', expected text (paths)" in refusal(tmp_path / "m.parquet")


def test_pictures_inside_a_parquet_file_and_lists_of_pictures_are_read(tmp_path):
    several = [[{"bytes": b"x", "path": "a"}, {"bytes": None, "path": "b.png"}], [{"bytes": None, "path": "c.png"}], [], None]
    for name, cells in {
        "lists": several,
        "bytes": [b"x", b"y", None, b"x"],
        "structs": [one[0] if one else None for one in several],
    }.items():
        pq.write_table(pa.table({"image": cells, "text": list("tuvw"), "label": list("xyxy")}), tmp_path / f"{name}.parquet")
    path = str(tmp_path) + os.sep
    assert read(tmp_path / "lists.parquet").inputs["image"] == [(b"x", f"{path}b.png"), f"{path}c.png", None, None]
    assert read(tmp_path / "bytes.parquet").inputs["image"] == [b"x", b"y", None, b"x"]
    assert read(tmp_path / "structs.parquet").inputs["image"] == [b"x", f"{path}c.png", None, None]


def test_several_pictures_of_a_text_file_are_a_json_list(tmp_path):
    nine = json.dumps([f"{i}.png" for i in range(9)]).replace('"', '""')
    rows = ['"[""a.png"", ""b.png""]",t,x', "c.png,t,x", '"[""d.png""]",t,x', f'"{nine}",t,x']
    found, issues = with_issues(manifest(tmp_path, HEADER + "\n".join(rows) + "\n"))
    path = str(tmp_path) + os.sep
    assert found.inputs["image"] == [(f"{path}a.png", f"{path}b.png"), f"{path}c.png", f"{path}d.png"]
    assert issues == [(5, "5", "column image has 9 images, expected at most 8")]


# Ids and splits.


def test_ids_used_twice_are_refused_with_their_rows_and_how_many(tmp_path):
    rows = "".join(f"t,x,{i % 7}\n" for i in range(14)) + "t,x,alone\n"
    message = refusal(manifest(tmp_path, "text,label,id\n" + rows), ("text",))
    assert "7 ids" in message
    assert "'0' in rows 2, 9" in message
    assert "'4' in rows" in message
    assert "'5'" not in message
    assert "alone" not in message


def test_a_sample_without_id_is_named_by_its_row(tmp_path):
    assert read(manifest(tmp_path, "text,label,id\nt,x,\nt,x,b\n"), ("text",)).ids == ["2", "b"]


def test_splits_are_known_by_many_names(tmp_path):
    names = ["train", "Training", " TRAIN ", "val", "valid", "Validation", "dev", "test", "testing", "Eval", ""]
    path = manifest(tmp_path, "text,label,split\n" + "".join(f"t,x,{name}\n" for name in names))
    assert read(path, ("text",)).splits == ["train"] * 3 + ["val"] * 4 + ["test"] * 3 + [None]


def test_unknown_splits_are_refused_all_at_once(tmp_path):
    message = refusal(manifest(tmp_path, "text,label,split\nt,x,fold1\nt,x,train\nt,x,fold2\n"), ("text",))
    for part in ("'fold1', 'fold2'", "column 'split'", "train, training"):
        assert part in message


def test_a_split_given_by_the_caller_overrides_the_file(tmp_path):
    path = manifest(tmp_path, "text,label,split\nt,x,fold1\n")
    assert read(path, ("text",), split="val").splits == ["val"]
    assert read(path, ("text",), split="val", columns=Columns(split="mine")).splits == ["val"]


# Tables.


def test_take_and_concat_keep_all_columns_in_step(tmp_path):
    one = read(manifest(tmp_path, "text,label,kind\nt,x,k\nu,y,l\n", "one.csv"), ("text",))
    two = read(manifest(tmp_path, "text,label,when\nv,z,w\n", "two.csv"), ("text",))
    both = Table.concat([one, two])
    assert len(both) == 3
    assert both.extra == {"kind": ["k", "l", ""], "when": ["", "", "w"]}
    part = both.take([2, 0])
    assert (part.inputs["text"], part.labels, part.rows) == (["v", "t"], ["z", "x"], [2, 2])
    assert part.files == [str(tmp_path / "two.csv"), str(tmp_path / "one.csv")]
    assert part.extra == {"kind": ["", "k"], "when": ["w", ""]}
    assert len(both) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["m.csv", "m.jsonl", "m.parquet"])
def test_a_million_rows_are_read_in_seconds(tmp_path, name):
    count = 1_000_000
    rows = [(f"images/{i // 5}.jpg", f"what is the colour of thing {i}?", "yes" if i % 2 else "no", f"q{i}") for i in range(count)]
    if name.endswith("csv"):
        with open(tmp_path / name, "w", newline="") as file:
            csv.writer(file).writerows([["image", "text", "label", "id"], *rows])
    elif name.endswith("jsonl"):
        with open(tmp_path / name, "w") as file:
            file.writelines(json.dumps({"image": i, "text": t, "label": label, "id": id}) + "\n" for i, t, label, id in rows)
    else:
        pq.write_table(pa.table(dict(zip(("image", "text", "label", "id"), zip(*rows, strict=True), strict=True))), tmp_path / name)
    del rows
    begun = time.perf_counter()
    assert len(read(tmp_path / name)) == count
    taken = time.perf_counter() - begun
    print(f"{name}: {taken:.1f} s")
    assert taken < 20  # measured: 3 to 6 s on a shared core
