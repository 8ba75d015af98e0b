"""The model's folder of a run: all that use needs, nothing else, and nothing that executes."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_world import REPOSITORY, SHORT

import fusion
from fusion.errors import UserError
from fusion.runs.bundle import FORMAT, NEEDED, read_bundle, write_bundle

ASK = """
import json, sys
import fusion
predictor = fusion.load(sys.argv[1])
found = predictor.predict(images=json.loads(sys.argv[2]), texts=json.loads(sys.argv[3]))
print(json.dumps(found.values.tolist()))
print([name for name in ("lightning", "jsonargparse", "fusion.data.module", "fusion.training") if name in sys.modules])
"""


@pytest.fixture
def run(tiny, fit_here):
    return fit_here("--recipe", tiny(), "--trainer.max_epochs=1")


@pytest.fixture
def asked(shapes_rows):
    folder, rows = shapes_rows
    return {"images": [str(folder / row["image"]) for row in rows[:4]] + [None], "texts": [row["text"] for row in rows[:3]] + [None, "is"]}


def test_a_models_folder_is_moved_and_asked_in_a_fresh_interpreter_without_lightning(run, asked, tmp_path):
    expected = fusion.load(str(run.folder / "checkpoints/best.ckpt")).predict(**asked).values
    assert np.array_equal(fusion.load(str(run.folder)).predict(**asked).values, expected)
    moved = shutil.move(run.folder / "model", tmp_path / "elsewhere")
    shutil.rmtree(run.folder)
    words = [sys.executable, "-c", ASK, str(moved), json.dumps(asked["images"]), json.dumps(asked["texts"])]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    assert done.returncode == 0, done.stderr
    values, modules = done.stdout.splitlines()
    assert np.allclose(json.loads(values), expected, atol=1e-6)
    assert modules == "[]"


def test_a_models_folder_holds_weights_and_plain_data_alone(run):
    folder = run.folder / "model"
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]
    held = run.checkpoint("best")
    weights = {name.removeprefix("model."): value for name, value in held["state_dict"].items()}
    found = load_file(folder / "model.safetensors")
    assert found.keys() == weights.keys()
    assert all((found[name] == weights[name]).all() for name in found)
    size = sum(weight.numel() * weight.element_size() for weight in weights.values())
    assert (folder / "model.safetensors").stat().st_size < size + 64 * 1024  # no state of an optimiser
    assert (folder / "model.safetensors").stat().st_mode == (folder / "model.json").stat().st_mode  # others may read it
    assert set(json.loads((folder / "model.json").read_text())) == {"format", "encoders", "head", "adapters", "processor"}


def test_training_starts_from_a_models_folder(run, tiny, fit_here, capsys):
    fit_here("--recipe", tiny(), f"--init_from={run.folder / 'model'}", *SHORT, runs="next")
    assert "weights" in capsys.readouterr().out


def test_a_run_that_goes_on_has_its_model_of_the_end(tiny, fit_here, stop_after, monkeypatch):
    stop_after(5)
    stopped = fit_here("--recipe", tiny(), runs="stopped")
    monkeypatch.undo()
    assert not (stopped.folder / "model").exists()
    resumed = fit_here("--resume", stopped.folder)
    assert (resumed.folder / "model" / "model.json").is_file()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "can't read .*model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"torn"), "can't read .*model.safetensors"),
        (lambda folder: (folder / "model.json").write_text("{"), "can't read .*model.json"),
        (lambda folder: (folder / "model.json").write_text("{}"), "is not a model of fusion"),
        (lambda folder: (folder / "model.json").write_text('{"format": 6}'), "has format 6, this version of fusion reads 7"),
        (lambda folder: (folder / "model.json").write_text('{"format": 7}'), "has no encoders, head, adapters, processor"),
    ],
)
def test_a_spoilt_models_folder_is_rejected_in_one_line(run, spoil, message):
    spoil(run.folder / "model")
    with pytest.raises(UserError, match=message):
        fusion.load(str(run.folder / "model") if "json" in message or "model of" in message else str(run.folder))


def test_weights_that_are_tied_are_written(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    with pytest.raises(RuntimeError):
        save_file({"a": shared, "b": shared}, tmp_path / "x.safetensors")
    write_bundle(
        tmp_path / "model", {name: FORMAT if name == "format" else {} for name in NEEDED}, {"a": shared, "b": shared, "c": shared.T}
    )
    _, weights = read_bundle(tmp_path / "model")
    assert torch.equal(weights["c"], shared.T)
    assert torch.equal(weights["a"], weights["b"])
