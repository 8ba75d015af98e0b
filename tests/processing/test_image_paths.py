"""Paths in cells that are not quite the paths of files."""

from pathlib import Path

import pytest
from reading import read_all, written


def table_of(folder: Path, *cells: str):
    rows = "".join(f"{cell},x\n" for cell in cells)
    return read_all(written(folder, f"image,label\n{rows}"), ("image",))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("a.png", "pics/b c.png", "home/h.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("cell", "file", "what"),
    [
        (" a.png", "a.png", "blanks"),
        ("a.png ", "a.png", "blanks"),
        ("pics\\b c.png", "pics/b c.png", "backslashes"),
        ("~/h.png", "home/h.png", "~"),
        ("file://FOLDER/a.png", "a.png", "file://"),
        ("file://FOLDER/pics/b%20c.png", "pics/b c.png", "percent"),
        ("file://localhostFOLDER/a.png", "a.png", "file://"),
        ("pics/b%20c.png", "pics/b c.png", "percent"),
        (" pics\\b%20c.png", "pics/b c.png", "blanks at its ends and percent-encoding and backslashes"),
    ],
)
def test_a_path_is_corrected_where_only_the_corrected_file_exists_and_that_is_noted(folder, cell, file, what):
    cell = cell.replace("FOLDER", str(folder))
    table, issues, notes = table_of(folder, cell)
    assert issues == []
    assert Path(table.inputs["image"][0]).samefile(folder / file)
    (note,) = notes
    assert what in note
    assert "2" in note


@pytest.mark.parametrize("name", [" a.png", "a.png ", "b\\c.png", "~", "d%20e.png", "7.0"])
def test_the_path_as_written_wins_if_that_file_exists(folder, name):
    (folder / name).touch()
    table, issues, notes = table_of(folder, name)
    assert (table.inputs["image"], issues, notes) == ([str(folder / name)], [], [])


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (" gone.png", "blanks at its ends"),
        ("C:\\pics\\gone.png", "backslashes"),
        ("~/gone.png", "~"),
        ("file:///gone%20too.png", "percent"),
        ("https://example.org/a.png", "download it first"),
        ("s3://bucket/a.png", "download it first"),
    ],
)
def test_a_path_that_leads_nowhere_is_dropped_with_what_was_seen(folder, cell, words):
    table, issues, _ = table_of(folder, "a.png", cell)
    assert table.inputs["image"] == [str(folder / "a.png")]
    ((row, reason),) = issues
    assert row == 3
    assert reason.startswith("image missing: ")
    assert words in reason


def test_the_disk_is_not_asked_about_ordinary_paths(folder, monkeypatch):
    path = written(folder, "image,label\na.png,x\npics/b c.png,x\n/abs/ü.png,x\n")
    asked = []
    monkeypatch.setattr("fusion.processing.image_paths.os.path.lexists", asked.append)
    read_all(path, ("image",))
    assert asked == []
