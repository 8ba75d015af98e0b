"""Checkpoints that are whole or not there, and that run no code."""

import errno
import os
import resource
import subprocess

import pytest
import torch
from lightning.pytorch import LightningModule

from fusion.errors import UserError
from fusion.runs.checkpoint_files import read_checkpoint
from fusion.training.callbacks.checkpoints import AtomicCheckpointIO

OLD, NEW = {"weight": torch.arange(5)}, {"weight": torch.randn(300_000)}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(OLD, path)
    return path


def untouched(path):
    """The old checkpoint, and nothing beside it."""
    assert os.listdir(path.parent) == [path.name]
    assert torch.equal(torch.load(path, weights_only=True)["weight"], OLD["weight"])


def test_what_was_saved_comes_back(tmp_path):
    path = tmp_path / "new" / "folder" / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint(NEW, path)
    assert torch.equal(AtomicCheckpointIO().load_checkpoint(path)["weight"], NEW["weight"])
    assert os.listdir(path.parent) == ["a.ckpt"]


def test_a_write_that_fails_half_way_leaves_the_previous_checkpoint_and_no_temporary_file(saved, monkeypatch):
    def half(checkpoint, file, *_, **__):
        file.write(b"PK" * 1000)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(UserError, match="the previous one is still there") as caught:
        AtomicCheckpointIO().save_checkpoint(NEW, saved)
    assert "No space left on device" in str(caught.value)
    assert str(saved) in str(caught.value)
    untouched(saved)


def test_a_first_write_that_fails_says_that_there_is_no_earlier_one(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match="there is no earlier one"):
        AtomicCheckpointIO().save_checkpoint(NEW, tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == []


def test_a_file_that_grows_past_what_the_system_allows_leaves_the_previous_checkpoint(saved):
    # The kernel's own refusal, in the middle of torch's writer.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="the previous one is still there"):
            AtomicCheckpointIO().save_checkpoint(NEW, saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    untouched(saved)
    AtomicCheckpointIO().save_checkpoint(NEW, saved)
    assert torch.equal(read_checkpoint(saved)["weight"], NEW["weight"])


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        AtomicCheckpointIO().save_checkpoint(OLD, disk / "last.ckpt")
        with pytest.raises(UserError, match="the previous one is still there"):
            AtomicCheckpointIO().save_checkpoint(NEW, disk / "last.ckpt")
        untouched(disk / "last.ckpt")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_an_interrupt_while_writing_leaves_the_previous_checkpoint(saved, monkeypatch):
    def interrupted(checkpoint, file, *_, **__):
        file.write(b"PK")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint(NEW, saved)
    untouched(saved)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_a_users_mistake(saved):
    saved.parent.chmod(0o500)
    try:
        with pytest.raises(UserError, match="Permission denied"):
            AtomicCheckpointIO().save_checkpoint(NEW, saved)
    finally:
        saved.parent.chmod(0o700)
    untouched(saved)


def test_a_folder_that_can_t_be_made_is_a_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't save the checkpoint"):
        AtomicCheckpointIO().save_checkpoint(NEW, tmp_path / "file" / "last.ckpt")


# Reading.


class Bomb:
    """Touches a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("load", [read_checkpoint, lambda path: AtomicCheckpointIO().load_checkpoint(path, weights_only=False)])
def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(tmp_path, load):
    torch.save({"weight": Bomb(tmp_path / "ran")}, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match="has more than tensors and plain data"):
        load(tmp_path / "bad.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_a_users_mistake_with_its_name(saved, share):
    AtomicCheckpointIO().save_checkpoint(NEW, saved)
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError) as caught:
        read_checkpoint(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize("content", [b"not a checkpoint at all", b"\x80\x02garbage", b"PK\x03\x04 no zip"])
def test_a_file_that_is_no_checkpoint_is_a_users_mistake(tmp_path, content):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(UserError):
        read_checkpoint(tmp_path / "x.ckpt")


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no checkpoint .*last\.ckpt"):
        read_checkpoint(tmp_path / "last.ckpt")


# Of a run.


def test_a_runs_checkpoints_are_plain_data_and_all_it_leaves_is_in_its_folder(tiny, fit_here, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = fit_here("--recipe", tiny(), "--trainer.max_epochs=1")
    assert sorted(os.listdir(run.folder / "checkpoints")) == ["best.ckpt", "last.ckpt"]
    for name in ("best", "last"):
        checkpoint = run.checkpoint(name)
        assert checkpoint["fusion"]["updates"] > 0
        assert checkpoint["fusion"]["processor"]["task"]["learnt"]["names"]
    assert any(key.startswith("model.head.") for key in checkpoint["state_dict"])
    assert os.listdir(tmp_path / "here") == []
    assert (run.folder / "metrics.csv").is_file()
    assert os.listdir(run.folder / "tensorboard")


def test_a_run_whose_disk_is_full_ends_with_one_line_and_status_2(tiny, tmp_path, monkeypatch, capsys):
    from fusion.cli.main import run

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    recipe = tiny()
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as ended:
        run("fit", ["--recipe", str(recipe), "--trainer.max_epochs=1"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "error: can't save the checkpoint" in told
    assert "Traceback" not in told


# The best score, and others' checkpoints.


def best_of(folder):
    held = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    return next(float(state["best_model_score"]) for name, state in held.items() if "BestAndLast" in name)


@pytest.mark.parametrize("where", ["relative", "moved"])
def test_a_run_that_goes_on_by_another_path_keeps_its_best(tiny, fit_here, tmp_path, monkeypatch, where):
    scores = iter([0.9, 0.1, 0.2, 0.3])
    usual = LightningModule.log_dict

    def log_dict(self, values, **options):
        fixed = {"val/accuracy": next(scores)} if "val/accuracy" in values else {}
        return usual(self, {**values, **fixed}, **options)

    monkeypatch.setattr(LightningModule, "log_dict", log_dict)
    folder = fit_here("--recipe", tiny(), "--trainer.max_epochs=2").folder
    best = (folder / "checkpoints" / "best.ckpt").read_bytes()
    assert best_of(folder) == pytest.approx(0.9)
    if where == "moved":
        moved = folder.rename(tmp_path / "elsewhere")
    else:
        monkeypatch.chdir(tmp_path)
        moved = folder.relative_to(tmp_path)
    fit_here("--resume", moved, "--trainer.max_epochs=4")
    assert best_of(moved) == pytest.approx(0.9)
    assert (moved / "checkpoints" / "best.ckpt").read_bytes() == best


def test_checkpoints_of_another_callback_overwrite_none_of_ours(tiny, fit_here):
    own = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename=best", "--trainer.callbacks.monitor=val/loss"]
    folder = fit_here("--recipe", tiny(), *own, "--trainer.callbacks.mode=max", "--trainer.callbacks.save_last=true").folder
    assert {file.name for file in (folder / "checkpoints").glob("*.ckpt")} == {"best.ckpt", "last.ckpt", "previous.ckpt"}
    assert {"best.ckpt", "last.ckpt"} <= {file.name for file in (folder / "more_checkpoints").glob("*.ckpt")}
    updates = [torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)["fusion"]["updates"] for name in ("previous", "last")]
    assert updates == [8, 16]
