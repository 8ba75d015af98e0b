"""A second command on the same run, after something has changed: it means the same, says what changed, or is rejected."""

import csv
import json
import re
from pathlib import Path

import pytest
from PIL import Image

import fusion.cli.fit as fit_module
from fusion.cli.evaluate import evaluate
from fusion.cli.main import run as run_command
from fusion.data.record import Record


@pytest.fixture
def table(write_manifest):
    """Reads and writes the manifest of the tiny world, without its given splits, ids and groups."""

    class Manifest:
        path = write_manifest(lambda i, row: {name: row[name] for name in ("image", "text", "label", "kind")})

        def rows(self):
            with open(self.path, newline="") as file:
                return list(csv.DictReader(file))

        def write(self, rows):
            with open(self.path, "w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)

        def change(self, row, **cells):
            rows = self.rows()
            rows[row] |= cells
            self.write(rows)

    return Manifest()


@pytest.fixture
def run(tiny, table, fit_here):
    """A short run on the table."""
    return fit_here("--recipe", tiny(manifest=table.path), "--trainer.max_epochs=1", "--data.test=0.2").folder


@pytest.fixture
def evaluated(run, capsys):
    """Scores the run's test split again; gives the scores and what was printed."""

    def call():
        capsys.readouterr()
        assert evaluate(["--run", str(run)]) == 0
        return json.loads((run / "evaluation-test.json").read_text())["all"], capsys.readouterr().out

    return call


def rows_of(run, split):
    columns = Record.read(run).columns
    return [row - 2 for row, s in zip(columns["row"], columns["split"], strict=True) if s == split]  # line 2 is row 0


def test_added_rows_leave_the_test_split_as_it_was(run, table, evaluated):
    before, _ = evaluated()
    rows = table.rows()
    new = [row | {"text": f"{row['text']} really"} for row in rows[:40]]
    table.write(new[:20] + rows + new[20:])
    after, told = evaluated()
    assert after == before
    assert "40 rows are new (manifest.csv, row 2)" in told


def test_the_order_of_the_rows_does_not_matter(run, table, evaluated):
    before, _ = evaluated()
    table.write(list(reversed(table.rows())))
    after, told = evaluated()
    assert after == before
    assert "the rows are in another order" in told


@pytest.mark.parametrize("column", ["text", "label"])
def test_a_changed_cell_moves_no_sample_to_another_split(run, table, evaluated, column):
    before, _ = evaluated()
    row = rows_of(run, "test")[0]
    table.change(row, **{column: "unheard of"})
    after, told = evaluated()
    assert after["samples"] == before["samples"]
    assert f"1 row is of another {column} (manifest.csv, row {row + 2})" in told


def test_removed_rows_are_reported(run, table, evaluated):
    gone = rows_of(run, "test")[0]
    before, _ = evaluated()
    table.write([row for i, row in enumerate(table.rows()) if i != gone])
    after, told = evaluated()
    assert after["samples"] == before["samples"] - 1
    assert "1 row is gone" in told


def test_a_changed_image_file_is_reported(run, table, evaluated):
    shown = {table.rows()[row]["image"] for row in rows_of(run, "test")}
    path = Path(sorted(shown)[0])
    before = path.read_bytes()
    try:
        Image.new("RGB", (64, 64), "white").save(path)
        _, told = evaluated()
    finally:
        path.write_bytes(before)  # the images are shared by all tests
    assert f"1 image files have changed since the run was trained (the first: {path})" in told


def test_a_row_that_now_names_another_split_keeps_its_own_and_is_reported(run, table, evaluated):
    before, _ = evaluated()
    moved = rows_of(run, "train")[0]
    table.write([row | {"split": "test" if i == moved else ""} for i, row in enumerate(table.rows())])
    after, told = evaluated()
    assert after == before
    assert f"1 row is in another split (manifest.csv, row {moved + 2})" in told


def test_a_change_in_another_column_is_reported_and_harmless(run, table, evaluated):
    before, _ = evaluated()
    table.change(5, kind="other")
    after, told = evaluated()
    assert after == before
    assert "1 row is changed in columns other than image, text and label" in told


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_goes_bad_during_training_ends_it_in_one_line_with_its_path(tiny, table, tmp_path, monkeypatch, capsys, workers):
    """Even from a worker process, whose errors torch wraps in its traceback."""
    copies = tmp_path / "copies"
    copies.mkdir()
    rows = table.rows()
    for row in rows:
        copy = copies / Path(row["image"]).name
        copy.write_bytes(Path(row["image"]).read_bytes())
        row["image"] = str(copy)
    table.write(rows)

    def then_gone(data):
        for path in copies.iterdir():
            path.write_bytes(b"")

    monkeypatch.setattr(fit_module, "print_data_notes", then_gone)
    options = ["--recipe", str(tiny(manifest=table.path)), "--data.memory_gib=0", f"--data.num_workers={workers}"]
    with pytest.raises(SystemExit) as ended:
        run_command("fit", options)
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert re.fullmatch(rf"error: {copies}/\S+: empty file; it could be read when the images were checked\..*\n", told)
