"""Checkpoints that are corrupt or in time; starting from weights; other numbers of ranks."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from safetensors.torch import save_file
from tiny_world import REPOSITORY, ROUNDING, TWO, Run, assert_same_end, furthest_weights, newest

import fusion.session as command
from fusion.benchmarks.kills import difference_of
from fusion.errors import UserError
from fusion.runs.checkpoint_files import find_corruption, newest_intact, read_checkpoint
from fusion.training.callbacks.checkpoints import AtomicCheckpointIO, BestAndLast
from fusion.training.callbacks.signals import SaveInTime
from fusion.training.weights import load_weights

# Damage.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small one: its bytes, and what is in it."""
    path = tmp_path_factory.mktemp("checkpoint") / "last.ckpt"
    held = {"weights": torch.arange(300.0), "more": {"bias": torch.ones(3)}, "updates": 7}
    AtomicCheckpointIO().save_checkpoint(held, path)
    return path, Bytes(path.read_bytes()), held


class Bytes(bytes):
    """Not printed whole by hypothesis."""

    def __repr__(self):
        return f"<{len(self)} bytes>"


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_byte_that_was_altered_is_found_or_changes_nothing(checkpoint, data):
    path, content, held = checkpoint
    place = data.draw(st.integers(0, len(content) - 1))
    altered = bytearray(content)
    altered[place] ^= data.draw(st.integers(1, 255))
    other = path.with_name("altered.ckpt")
    other.write_bytes(altered)
    if find_corruption(other) is None:
        assert difference_of(read_checkpoint(other), held) is None


@pytest.mark.parametrize(
    ("record", "field", "flip"),
    [(b"PK\1\2", 38, 0x10), (b"PK\6\6", 48, 0xFF), (b"PK\6\6", 49, 0xF0)],
    ids=["a tensor marked as a folder", "where the list of members begins", "where it can't begin"],
)
def test_what_is_altered_in_the_list_of_members_is_found(checkpoint, record, field, flip):
    """Which torch reads in its own way: a folder's content it takes from memory that nothing was written to."""
    path, content, _ = checkpoint
    altered = bytearray(content)
    altered[content.index(record) + field] ^= flip
    other = path.with_name("altered.ckpt")
    other.write_bytes(altered)
    assert "is marked as a folder" in find_corruption(other) or "unreadable" in find_corruption(other)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999))
def test_a_torn_file_is_found(checkpoint, share):
    path, content, _ = checkpoint
    torn = path.with_name("torn.ckpt")
    torn.write_bytes(content[: int(share * len(content))])
    assert "unreadable" in find_corruption(torn)
    with pytest.raises(UserError, match="is corrupt"):
        read_checkpoint(torn)


def test_an_altered_weight_is_named(checkpoint):
    path, content, _ = checkpoint
    place = content.index(torch.arange(300.0).numpy().tobytes()) + 400
    altered = path.with_name("altered.ckpt")
    altered.write_bytes(content[:place] + b"\x01" + content[place + 1 :])
    assert re.search(r"data/0 has a wrong checksum", find_corruption(altered))


def test_the_checkpoint_before_the_last_is_kept_and_used_when_the_last_is_damaged(tiny, fit_here, stop_after, monkeypatch, capsys):
    recipe = tiny(dropout=0.4)
    every = "--checkpoint.every_updates=3"
    whole = fit_here("--recipe", recipe, every, runs="whole")
    stop_after(7)
    stopped = fit_here("--recipe", recipe, every, runs="stopped").folder
    monkeypatch.setattr(command, "SaveInTime", SaveInTime)
    last, previous = (stopped / "checkpoints" / f"{name}.ckpt" for name in ("last", "previous"))
    assert [read_checkpoint(path)["fusion"]["updates"] for path in (last, previous)] == [7, 6]
    last.write_bytes(last.read_bytes()[:-1000])
    resumed = fit_here("--resume", stopped)
    assert "last.ckpt is corrupt: it is unreadable" in (told := capsys.readouterr().out)
    assert "resuming from previous.ckpt" in told
    assert_same_end(resumed, whole)


def test_a_run_without_a_whole_checkpoint_is_refused_with_what_is_wrong(tmp_path):
    (tmp_path / "last.ckpt").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"last\.ckpt is corrupt"):
        newest_intact(tmp_path)


def test_a_checkpoint_of_another_version_is_refused_with_a_way_out(tiny, fit_here, stop_after, monkeypatch):
    stop_after(2)
    stopped = fit_here("--recipe", tiny()).folder
    monkeypatch.setattr(command, "SaveInTime", SaveInTime)
    path = stopped / "checkpoints" / "last.ckpt"
    held = read_checkpoint(path)
    held["fusion"]["format"] = 1
    AtomicCheckpointIO().save_checkpoint(held, path)
    with pytest.raises(UserError, match=r"has format 1.*--init_from"):
        fit_here("--resume", stopped)


# In time.


class Saves(Callback):
    """The updates at which checkpoints were written."""

    def __init__(self):
        self.at = []

    def on_save_checkpoint(self, trainer, module, checkpoint):
        self.at.append(module.updates)


def test_checkpoints_are_written_after_so_many_updates(parts, tmp_path):
    saves, checkpoint = Saves(), BestAndLast(every_updates=3)
    checkpoint.dirpath = str(tmp_path)
    model, data, trainer = parts(
        "--trainer.enable_checkpointing=true", "--trainer.max_epochs=1", callbacks=[saves, SaveInTime(), checkpoint]
    )
    trainer.fit(model, datamodule=data)
    assert [update for update in saves.at if update < 8] == [3, 6]
    assert saves.at[-1] == 8


def test_checkpoints_are_written_after_so_many_minutes(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    checkpoint = BestAndLast(every_minutes=0.5)
    due = []
    for seconds in (10, 29, 31, 40):
        clock[0] = 100.0 + seconds
        due.append(checkpoint.due_by_clock())
    assert due == [False, False, True, True]


@pytest.mark.parametrize("option", ["every_updates=0", "every_minutes=0"])
def test_a_schedule_of_nothing_is_refused(tiny, option):
    with pytest.raises(UserError, match="checkpoint: every_updates"):
        command.fit(["--recipe", str(tiny()), f"--checkpoint.{option}"])


def test_a_run_killed_between_two_checkpoints_keeps_its_log(tiny, fit_here, monkeypatch, tmp_path):
    """Whatever the logger held back when the process died."""
    recipe = tiny(dropout=0.4)
    whole = fit_here("--recipe", recipe, runs="whole")

    class Killed(SaveInTime):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if module.updates == 6:
                trainer.loggers[0].save = trainer.loggers[0].experiment.save = lambda: None
                raise RuntimeError("killed")

    monkeypatch.setattr(command, "SaveInTime", Killed)
    with pytest.raises(RuntimeError, match="killed"):
        fit_here("--recipe", recipe, "--checkpoint.every_updates=5", runs="killed")
    monkeypatch.setattr(command, "SaveInTime", SaveInTime)
    folder = newest(tmp_path / "killed")
    resumed = Run(command.fit(["--resume", str(folder), "--checkpoint.every_updates=5"]), folder)
    for name in ("train/loss_step", "val/loss"):
        assert resumed.column(name) == whole.column(name), name


# Another number of ranks.


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks_and_sees_every_sample_of_the_epoch_once(
    tiny, tmp_path, fit_here, stop_after, monkeypatch
):
    recipe = tiny()
    whole = fit_here("--recipe", recipe, runs="whole")
    stop_after(4)
    stopped = fit_here("--recipe", recipe, runs="stopped").folder
    monkeypatch.setattr(command, "SaveInTime", SaveInTime)
    words = [sys.executable, str(REPOSITORY / "scripts/fit.py"), "--resume", str(stopped), *TWO]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "2 devices x 8" in done.stdout
    # The global batches, and so the weights, are those of one rank: no sample was left out or seen twice.
    assert furthest_weights(Run(0, stopped), whole) < ROUNDING
    assert Run(0, stopped).results()["updates"] == whole.results()["updates"]


# Starting from weights.


@pytest.fixture
def finished(tiny, fit_here):
    return fit_here("--recipe", tiny(), "--trainer.max_epochs=1")


def test_a_run_starts_from_the_weights_of_another_and_from_nothing_else(tiny, fit_here, finished, capsys):
    held = finished.checkpoint("best")
    started = fit_here(
        "--recipe",
        tiny(),
        f"--init_from={finished.folder}/checkpoints/best.ckpt",
        "--trainer.max_epochs=1",
        "--model.optimizer.init_args.lr=0",
    )
    assert difference_of(started.checkpoint()["state_dict"], held["state_dict"]) is None
    assert started.checkpoint()["fusion"]["updates"] == 8  # counted from its own start
    weights = sum(name.startswith("model.") for name in held["state_dict"])
    assert f"{weights} of {weights} weights" in capsys.readouterr().out


def test_names_that_are_missing_unexpected_or_of_another_shape_are_listed(parts, tmp_path):
    model, data, _ = parts()
    built = model.build(data)
    state = {name: value.clone().contiguous() for name, value in built.state_dict().items()}
    state["head.classifier.weight"] = torch.zeros(3, 32)
    del state["head.classifier.bias"]
    state["decoder.weight"] = torch.zeros(1)
    state["encoders.image.body.cls_token"] += 1
    save_file(state, tmp_path / "weights.safetensors")
    before = built.state_dict()["head.classifier.weight"].clone()
    told = load_weights(built, tmp_path / "weights.safetensors")
    assert f"{len(state) - 2} of {len(state)} weights" in told
    assert "1 missing: head.classifier.bias" in told
    assert "1 unexpected: decoder.weight" in told
    assert re.search(r"1 of another shape: head\.classifier\.weight \(3, 32\) where \(\d+, 32\) is expected", told)
    assert torch.equal(built.state_dict()["head.classifier.weight"], before)
    assert torch.equal(built.state_dict()["encoders.image.body.cls_token"], state["encoders.image.body.cls_token"])


@pytest.mark.parametrize("kind", ["missing", "torn", "foreign", "empty", "code"])
def test_a_file_that_is_no_use_is_refused_by_name(parts, tmp_path, kind):
    model, data, _ = parts()
    built = model.build(data)
    path = tmp_path / "weights.pt"
    if kind == "torn":
        torch.save({"a": torch.ones(100)}, path)
        path.write_bytes(path.read_bytes()[:-50])
    elif kind == "foreign":
        torch.save({"a": torch.ones(1)}, path)
    elif kind == "empty":
        torch.save({}, path)
    elif kind == "code":
        torch.save({"a": Path("x")}, path)
    expected = {"missing": "no such file", "torn": "corrupt", "foreign": "none of its 1 weights", "empty": "no weights", "code": "rejected"}
    with pytest.raises(UserError, match=rf"weights\.pt: .*{expected[kind]}"):
        load_weights(built, path)
