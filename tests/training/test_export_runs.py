"""Packages of whole runs: they answer raw samples like the run, without torch, or say in one line why not."""

import errno
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_world import SHORT

import fusion
from fusion.cli.export import export as export_command
from fusion.deploy import exporting
from fusion.deploy.exporting import export
from fusion.errors import UserError
from fusion.packages.package import Package
from fusion.packages.runtimes import CompiledRuntime, TorchRuntime

MADE = []  # a run and its package, for all tests, which only read them


@pytest.fixture
def made(tiny, fit_here, tmp_path_factory):
    if not MADE:
        run = fit_here("--recipe", tiny(), *SHORT)
        MADE.extend([run, export(run.folder, "torch", tmp_path_factory.mktemp("torch") / "package").folder])
    return MADE


@pytest.fixture
def run(made):
    return made[0]


@pytest.fixture
def package(made, tmp_path):
    """A copy, which may be altered."""
    return shutil.copytree(made[1], tmp_path / "package")


@pytest.fixture
def raw(tmp_path):
    """Images and texts as somebody may have them."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (50, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.jpg", quality=80)
    images = [str(tmp_path / "one.jpg"), None, (tmp_path / "one.jpg").read_bytes(), Image.fromarray(pixels[:30]), pixels]
    return {"images": images, "texts": ["is there a circle", "red?", None, 3.0, " "]}


def assert_same(found, expected):
    assert found.answers == expected.answers
    assert np.abs(found.values - expected.values).max() < 1e-5
    assert found.names == expected.names
    assert {name: mask.tolist() for name, mask in found.present.items()} == {n: mask.tolist() for n, mask in expected.present.items()}


@pytest.fixture
def torch_log(monkeypatch):
    """The warnings of torch's loggers during the test."""
    records = []

    def handle(_, record):
        if record.name.startswith("torch") and record.levelno >= logging.WARNING:
            records.append(record.getMessage())

    monkeypatch.setattr(logging.Logger, "handle", handle)
    return records


@pytest.mark.parametrize("to", ["onnx", pytest.param("torch", marks=pytest.mark.slow), pytest.param("aot", marks=pytest.mark.slow)])
def test_a_package_answers_raw_samples_like_the_run(run, raw, tmp_path, capsys, to, torch_log):
    assert export_command(["--run", str(run.folder), "--to", to, "--out", str(tmp_path / "p")]) == 0
    assert "values differ from the run's by at most" in capsys.readouterr().out
    loaded, model = fusion.load(tmp_path / "p"), fusion.load(run.folder)
    assert isinstance(loaded, Package)
    assert_same(loaded.predict(**raw), model.predict(**raw))
    assert_same(loaded.predict(**raw, batch_size=1), model.predict(**raw))
    card = (tmp_path / "p" / "README.md").read_text()
    assert f"accuracy {run.results()['test']['accuracy']:.4f}" in card
    assert not torch_log  # of the GPU that is missing, of a CPU newer than the package needs


def test_what_a_package_can_not_read_it_refuses_as_the_run_does(run, package, raw, tmp_path):
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "one.jpg").read_bytes()[:300])
    bad = [{"images": [tmp_path / "cut.jpg"]}, {"images": ["nowhere.png"]}, {"texts": [None]}, {"images": "a.png"}, {"sound": [1]}]
    bad += [{"images": [b""]}, {"texts": [{}]}, {"images": ["a.png"], "texts": ["a", "b"]}]
    loaded, model = fusion.load(package), fusion.load(run.folder)
    for inputs in bad:
        with pytest.raises(UserError) as ours:
            loaded.predict(**inputs)
        with pytest.raises(UserError) as theirs:
            model.predict(**inputs)
        assert str(ours.value) == str(theirs.value)


@pytest.mark.slow
def test_a_package_of_onnx_needs_no_torch(run, raw, tmp_path):
    folder = export(run.folder, "onnx", tmp_path / "package").folder
    script = (
        "import sys, json, fusion\n"
        f"answer = fusion.load({str(folder)!r}).predict(images=[{raw['images'][0]!r}, None], texts=['is there a circle', 'red?'])\n"
        "loaded = [name for name in ('torch', 'transformers', 'timm', 'lightning', 'pyarrow') if name in sys.modules]\n"
        "print(json.dumps([answer.values.tolist(), loaded]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    values, loaded = json.loads(done.stdout)
    assert loaded == []
    expected = fusion.load(run.folder).predict(images=[raw["images"][0], None], texts=["is there a circle", "red?"])
    assert np.abs(np.array(values) - expected.values).max() < 1e-5


def test_a_package_that_was_altered_by_one_byte_is_refused(package):
    for name in ("model.pt2", "processor.json", "text.tokenizer.json", "README.md", "package.json"):
        content = bytearray((package / name).read_bytes())
        content[len(content) // 2] ^= 1
        (package / name).write_bytes(bytes(content))
        with pytest.raises(UserError):
            Package.load(package)
        content[len(content) // 2] ^= 1
        (package / name).write_bytes(bytes(content))
    Package.load(package)
    (package / "text.tokenizer.json").rename(package / "other.json")
    with pytest.raises(UserError, match=r"has a file that it was not written with: other.json"):
        Package.load(package)
    (package / "other.json").unlink()
    with pytest.raises(UserError, match=r"lacks text.tokenizer.json"):
        Package.load(package)


def test_a_package_of_a_newer_version_is_refused(package):
    about = json.loads((package / "package.json").read_text())
    (package / "package.json").write_text(json.dumps(about | {"format": 99, "fusion": "9.9"}))
    with pytest.raises(UserError, match=r"format 99, this version of fusion reads 1; it was written by fusion 9.9: install that version"):
        Package.load(package)


def test_nothing_half_written_is_left(run, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"can't write .*package \(No space left on device\); nothing of it is left"):
        export(run.folder, "torch", tmp_path / "package")
    assert sorted(tmp_path.iterdir()) == before


def test_only_what_a_package_was_written_with_is_replaced(run, package, tmp_path, monkeypatch):
    (package / "notes.txt").write_text("mine")
    other = tmp_path / "app"
    other.mkdir()
    (other / "package.json").write_text('{"name": "my-app"}')
    for folder in (package, other):
        with pytest.raises(UserError):
            export(run.folder, "torch", folder, replace=True)
    assert (package / "notes.txt").read_text() == "mine"
    assert [path.name for path in other.iterdir()] == ["package.json"]
    (package / "notes.txt").unlink()
    beside = sorted(tmp_path.iterdir())
    before, rename, moved = (package / "package.json").read_bytes(), os.replace, []

    def fails_the_second_time(source, target):
        moved.append(source)
        if len(moved) == 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fails_the_second_time)
    with pytest.raises(UserError, match="Input/output error"):
        export(run.folder, "torch", package, replace=True)
    assert len(moved) == 3
    assert (package / "package.json").read_bytes() == before
    assert sorted(tmp_path.iterdir()) == beside


def test_a_package_reads_no_file_from_elsewhere(package, tmp_path):
    (tmp_path / "outside.json").write_bytes((package / "text.tokenizer.json").read_bytes())
    state = json.loads((package / "processor.json").read_text())
    state["inputs"]["text"]["tokenizer_file"] = "../outside.json"
    (package / "processor.json").write_text(json.dumps(state))
    sums = (package / "SHA256SUMS").read_text().splitlines()
    digest = hashlib.sha256((package / "processor.json").read_bytes()).hexdigest()
    (package / "SHA256SUMS").write_text("".join(f"{digest if 'processor' in one else one[:64]}{one[64:]}\n" for one in sums))
    with pytest.raises(UserError, match=r"has the tokenizer ../outside.json; expected a file of the package"):
        Package.load(package)


def test_several_images_are_named_by_the_sample_where_the_run_had_one(package, raw):
    image = raw["images"][0]
    with pytest.raises(UserError, match=r"sample 70: its image can't be read: there are several images, but the run had one"):
        fusion.load(package).predict(images=[image] * 70 + [[image, image]])


def test_a_program_is_moved_with_the_tensors_it_makes(package):
    runtime = TorchRuntime(package / "model.pt2", json.loads((package / "package.json").read_text())["graph_inputs"], device="meta")
    made = [node.kwargs["device"] for node in runtime.model.graph.nodes if node.kwargs.get("device") is not None]
    assert {torch.device(one).type for one in made} <= {"meta"}
    assert all(weight.is_meta for weight in runtime.model.parameters())


def test_a_device_that_is_not_there_is_one_line(run, package):
    for load in (lambda device: fusion.load(run.folder, device=device), lambda device: fusion.load(package, device=device)):
        with pytest.raises(UserError, match="device"):
            load("nonsense")
    with pytest.raises(UserError, match="a compiled package runs on CPUs"):
        CompiledRuntime(package / "model.pt2", [], device="cuda")


def test_a_package_that_differs_is_not_written(run, tmp_path, monkeypatch):
    class Wrong(exporting.RUNTIMES["torch"]):
        def __call__(self, arrays):
            return super().__call__(arrays) + np.float32(3e-5)

    monkeypatch.setitem(exporting.RUNTIMES, "torch", Wrong)
    with pytest.raises(UserError, match=r"differs from the run by 3e-05, more than 1e-05: it isn't written"):
        export(run.folder, "torch", tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_mistakes_are_named(run, package, tmp_path):
    with pytest.raises(UserError, match=r"--opset 11 is too old: attention with masks needs at least 18"):
        export(run.folder, "onnx", tmp_path / "p", opset=11)
    with pytest.raises(UserError, match=r"--opset 23: ONNX Runtime can't run its attention; expected 18 to 22"):
        export(run.folder, "onnx", tmp_path / "p", opset=23)
    with pytest.raises(UserError, match=r"there is a package in .* already; replace it by --replace"):
        export(run.folder, "torch", package)
    with pytest.raises(UserError, match=r"holds other files than a package"):
        export(run.folder, "torch", run.folder)
    with pytest.raises(UserError, match=r"there is no run"):
        export(tmp_path / "nowhere", "torch", tmp_path / "p")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no checkpoint 'best'; it has none: is it a run folder"):
        export(tmp_path / "empty", "torch", tmp_path / "p")
    with pytest.raises(UserError, match=r"is an exported package; expected the run that it was exported from"):
        export(package, "torch", tmp_path / "p")
    (tmp_path / "unfinished" / "start").mkdir(parents=True)
    for folder in (tmp_path / "unfinished", tmp_path / "unfinished" / "start"):
        (folder / "recipe.yaml").touch()  # a run that began from a pruned model, and was stopped before its first checkpoint
    with pytest.raises(UserError, match=r"unfinished has no checkpoint 'best'"):
        export(tmp_path / "unfinished", "torch", tmp_path / "p")
    with pytest.raises(UserError, match=rf"holds several runs; expected one, such as .*{run.folder.name}"):
        export(run.folder.parent, "torch", tmp_path / "p")
    with pytest.raises(UserError, match=r"--to onxn: Did you mean onnx"):
        export(run.folder, "onxn", tmp_path / "p")
    with pytest.raises(UserError, match=r"is not a package; make one by: fusion export"):
        Package.load(tmp_path)
