"""The Python door does what the command does, raises instead of exiting, and speaks through logging."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_world import REPOSITORY, newest

import fusion
from fusion.api import from_working_folder, image_columns, write_table
from fusion.errors import UserError

EPOCH = {"trainer.max_epochs": 1, "model.head": "Gated"}


@pytest.fixture
def frame(shapes_rows):
    folder, rows = shapes_rows
    return pandas.DataFrame([row | {"image": str(folder / row["image"])} for row in rows])


def test_a_run_is_what_the_command_makes(tiny, fit_here, tmp_path, capsys):
    command = fit_here("--recipe", tiny(), "--trainer.max_epochs=1", "--model.head=Gated", runs="command")
    capsys.readouterr()
    run = fusion.fit(tiny(), EPOCH, runs=tmp_path / "python")
    assert capsys.readouterr().out == ""  # the bar goes to the standard error
    assert isinstance(run, fusion.Run)
    assert run.folder == newest(tmp_path / "python")
    assert run.scores["test"] == command.results()["test"]
    assert run.scores["val"]["accuracy"] == pytest.approx(max(command.column("val/accuracy")))
    assert [row["train/loss_step"] for row in run.history if "train/loss_step" in row] == command.column("train/loss_step")
    assert run.evaluate()["all"]["accuracy"] == pytest.approx(run.scores["test"]["accuracy"])
    by_kind = run.evaluate(by="kind")
    assert by_kind.keys() >= {"all", "existence"}
    assert by_kind["all"]["samples"] == sum(scores["samples"] for name, scores in by_kind.items() if name != "all")
    recipes = [(folder / "recipe.yaml").read_text() for folder in (command.folder, run.folder)]
    assert recipes[0].replace(str(tmp_path / "command"), "X") == recipes[1].replace(str(tmp_path / "python"), "X")


def test_what_the_command_prints_is_logged(tiny, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="fusion"):
        fusion.fit(tiny(), EPOCH, runs=tmp_path / "python")
    said = "\n".join(record.getMessage() for record in caplog.records if record.name == "fusion")
    assert "global batch" in said
    assert "epoch 1/1  loss" in said
    assert "this model" in said


@pytest.mark.parametrize(
    "make", [pandas.DataFrame, lambda rows: pa.Table.from_pylist(rows), lambda rows: pandas.DataFrame(rows).to_dict("list")]
)
def test_tables_in_memory_train_as_files_do(tiny, frame, tmp_path, make, monkeypatch):
    rows = frame.to_dict("records")
    file = fusion.fit(tiny(), EPOCH, runs=tmp_path / "file")
    folder = Path(rows[0]["image"]).parents[1]
    monkeypatch.chdir(folder)  # relative paths are from the working folder
    relative = [row | {"image": os.path.relpath(row["image"], folder)} for row in rows]
    run = fusion.fit(tiny(), EPOCH, train=make(relative), runs=tmp_path / "table")
    assert run.scores["test"] == pytest.approx(file.scores["test"], abs=1e-6)
    monkeypatch.chdir(tmp_path)
    again = fusion.Run(run.folder)
    assert again.evaluate()["all"]["accuracy"] == pytest.approx(run.scores["test"]["accuracy"])
    monkeypatch.chdir(folder)
    tested = [row for row in relative if row["split"] == "test"]
    scores = again.evaluate(manifest=make(tested))["all"]
    assert scores["accuracy"] == pytest.approx(run.scores["test"]["accuracy"])
    answers = again.predict([row["image"] for row in tested], [row["text"] for row in tested]).answers
    assert np.mean([a == row["label"] for a, row in zip(answers, tested, strict=True)]) == pytest.approx(scores["accuracy"])


def test_tables_of_their_own_for_validation_and_test(tiny, frame, tmp_path):
    parts = {split: frame[frame.split == split].drop(columns="split") for split in ("train", "val", "test")}
    run = fusion.fit(tiny(), EPOCH, **parts, runs=tmp_path / "runs")
    assert run.evaluate()["all"]["samples"] == len(parts["test"])


def test_a_run_goes_on_from_python(tiny, tmp_path, fit_here, stop_after, monkeypatch):
    stop_after(5)
    with pytest.raises(KeyboardInterrupt, match=r"Interrupted after \d+ updates and saved"):
        fusion.fit(tiny(), runs=tmp_path / "python")
    monkeypatch.undo()
    run = fusion.fit(resume=newest(tmp_path / "python"))
    assert run.scores["test"] == fit_here("--recipe", tiny(), runs="whole").results()["test"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "quikstart"}, "Did you mean quickstart"),
        ({"recipe": "quickstart", "options": {"trainer.max_epoch": 3}}, "Did you mean"),
        ({"recipe": "own"}, "expected either --data.manifest=FILE"),
        ({"recipe": "own", "train": 3}, "manifest is a int; expected a file, a data frame"),
        ({"recipe": "own", "train": {"text": ["a", 1], "label": ["x", "y"]}}, "manifest can't be written as Parquet"),
        ({"recipe": "own", "resume": "runs/x"}, "not both"),
        ({"resume": "runs/none"}, "can't resume 'runs/none'"),
        ({"resume": "runs/none", "train": "x.csv"}, "keeps its data"),
    ],
)
def test_mistakes_raise_and_leave_nothing_behind(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        fusion.fit(**arguments)
    assert not list(tmp_path.glob("runs/*/*/recipe.yaml"))
    with pytest.raises(UserError, match=r"has no recipe\.yaml"):
        fusion.Run(tmp_path)


@pytest.mark.slow
def test_importing_fusion_takes_no_longer_than_torch_plus_a_little():
    """Three times each, in turns: the shortest is the least disturbed."""
    code = "import sys, time; began = time.perf_counter(); import {}; print(time.perf_counter() - began)"
    seconds = {"torch": [], "fusion": [], "fusion.heads": []}
    for _ in range(3):
        for name in seconds:
            done = subprocess.run(
                [sys.executable, "-c", code.format(name)],
                capture_output=True,
                text=True,
                check=True,
                env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            )
            seconds[name].append(float(done.stdout))
    assert min(seconds["fusion"]) < min(seconds["torch"]) + 0.3
    assert min(seconds["fusion.heads"]) < min(seconds["torch"]) * 1.2 + 0.3


def test_results_hold_validation_and_test_and_the_speed_of_each_epoch(tiny, tmp_path):
    run = fusion.fit(tiny(), EPOCH | {"trainer.max_epochs": 2}, runs=tmp_path / "runs")
    held = json.loads((run.folder / "results.json").read_text())
    assert held["val"].keys() >= {"accuracy", "balanced_accuracy", "f1_macro", "loss"}
    rates = json.loads((run.folder / "timing.json").read_text())["samples_per_s"]
    assert len(rates) == 2
    assert min(rates) > 0
    assert repr(run) == f"Run('{run.folder}')"


def test_paths_of_pictures_are_from_the_working_folder_however_they_are_held(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    absolute = str(tmp_path / "a.png")
    cells = [
        "a.png",
        ["a.png", None],
        {"bytes": None, "path": "a.png"},
        '["a.png", "/b.png"]',
        "~/c.png",
        None,
        b"x",
        "https://x.org/a.png",
    ]
    expected = [absolute, [absolute, None], {"bytes": None, "path": absolute}, f'["{absolute}", "/b.png"]', "~/c.png", None, b"x"]
    assert [from_working_folder(cell) for cell in cells] == [*expected, "https://x.org/a.png"]
    frame = pandas.DataFrame({"image": pandas.Categorical(["a.png", "b.png", "a.png"]), "text": list("xyz")})
    table = pq.read_table(write_table(frame, "manifest", tmp_path / "tables", ["image"]))
    assert table.column("image").to_pylist() == [absolute, str(tmp_path / "b.png"), absolute]
    for bad in (pandas.DataFrame([[1, 2]], columns=["a", "a"]), {"text": 3}):
        with pytest.raises(UserError, match="manifest can't be written as Parquet"):
            write_table(bad, "manifest", tmp_path / "tables", [])


def test_columns_of_pictures_are_known_by_the_kinds_of_inputs(tiny, tmp_path):
    inputs = '{"photo": {"class_path": "ImageInput", "init_args": {"column": "front"}}, "about": {"class_path": "TextInput"}}'
    assert image_columns([f"--recipe={tiny()}", f"--data.inputs={inputs}"]) == ["front", "image"]
    assert image_columns([f"--recipe={tiny()}", "--data.columns.image=picture"]) == ["picture"]


def test_options_may_be_numbers_of_numpy(tiny, tmp_path):
    run = fusion.fit(tiny(), EPOCH | {"trainer.max_steps": np.int64(2), "model.optimizer.lr": np.float32(0.125)}, runs=tmp_path / "runs")
    assert json.loads((run.folder / "results.json").read_text())["updates"] == 2
