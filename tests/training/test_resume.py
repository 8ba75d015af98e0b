"""Interrupted and continued runs end where the uninterrupted one does, to the bit."""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from slow_cases import slow_except
from tiny_world import REPOSITORY, TWO, Run, assert_same_end, newest

import fusion.session as command
from fusion.benchmarks.kills import difference_of
from fusion.cli.main import run as run_command
from fusion.errors import INTERRUPTED, REQUEUE, UserError
from fusion.training import Engine
from fusion.training.callbacks.signals import SaveInTime
from fusion.training.means import Means

# An epoch has 8 batches of 16; the run has two epochs.


@pytest.mark.parametrize("stop", slow_except([1, 4, 7, 8, 9, 12, 15], 4, 12))
def test_a_run_stopped_anywhere_and_resumed_ends_like_the_uninterrupted_one(interrupted_and_whole, fit_here, stop):
    stopped, whole = interrupted_and_whole(stop)
    assert stopped.checkpoint()["fusion"]["updates"] == stop
    assert len(stopped.column("val/accuracy")) == stop // 8
    assert not (stopped.folder / "results.json").exists()
    resumed = fit_here("--resume", stopped.folder)
    assert resumed.status == 0
    assert_same_end(resumed, whole)


def test_the_dropout_of_these_runs_is_random(tiny, fit_here):
    first = fit_here("--recipe", tiny(dropout=0.4), runs="first")
    other = fit_here("--recipe", tiny(dropout=0.0), runs="other")
    assert difference_of(first.checkpoint()["state_dict"], other.checkpoint()["state_dict"]) is not None


def test_the_same_command_twice_gives_the_same_weights(tiny, fit_here):
    recipe = tiny(dropout=0.4)
    assert_same_end(fit_here("--recipe", recipe, runs="first"), fit_here("--recipe", recipe, runs="second"))


@pytest.mark.parametrize("stop", slow_except([3, 4], 3))
def test_a_run_that_accumulates_finishes_its_update_before_it_stops(interrupted_and_whole, fit_here, stop):
    stopped, whole = interrupted_and_whole(stop, "--trainer.accumulate_grad_batches=2")
    assert stopped.checkpoint()["fusion"]["updates"] == 2
    assert_same_end(fit_here("--resume", stopped.folder), whole)


def test_a_run_may_be_stopped_and_resumed_twice(interrupted_and_whole, fit_here, stop_after, monkeypatch):
    stopped, whole = interrupted_and_whole(5)
    stop_after(3)
    again = fit_here("--resume", stopped.folder)
    assert again.status == INTERRUPTED
    assert again.checkpoint()["fusion"]["updates"] == 8
    monkeypatch.setattr(command, "SaveInTime", SaveInTime)
    assert_same_end(fit_here("--resume", stopped.folder), whole)


def test_a_run_that_crashed_resumes_from_the_end_of_its_last_epoch(tiny, fit_here, monkeypatch, tmp_path):
    recipe = tiny(dropout=0.4)
    whole = fit_here("--recipe", recipe, runs="whole")

    class Crash(SaveInTime):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 3:
                raise RuntimeError("power cut")

    monkeypatch.setattr(command, "SaveInTime", Crash)
    with pytest.raises(RuntimeError, match="power cut"):
        fit_here("--recipe", recipe, runs="crashed")
    monkeypatch.setattr(command, "SaveInTime", SaveInTime)
    assert_same_end(fit_here("--resume", newest(tmp_path / "crashed")), whole)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [4, 8])
def test_resume_is_exact_with_workers_and_augmentation(interrupted_and_whole, fit_here, stop):
    flip = "--data.augment=[{class_path: torchvision.transforms.v2.RandomHorizontalFlip}]"
    stopped, whole = interrupted_and_whole(stop, "--data.num_workers=2", flip)
    assert_same_end(fit_here("--resume", stopped.folder), whole)


@pytest.mark.parametrize("stop", slow_except([3, 8, 12], 12))
def test_the_log_of_a_resumed_run_tells_the_whole_run(interrupted_and_whole, fit_here, stop):
    stopped, whole = interrupted_and_whole(stop)
    resumed = fit_here("--resume", stopped.folder)
    for name in ("val/accuracy", "val/loss", "train/loss_step", "train/loss_epoch", "train/accuracy_epoch", "train/lr"):
        assert resumed.column(name) == whole.column(name), name


class Seen(Means):
    """What an engine keeps of an epoch."""

    engine = SimpleNamespace(device=torch.device("cpu"), trainer=SimpleNamespace(world_size=1))

    def __init__(self, losses, before=None):
        super().__init__()
        self.sums = before or self.sums
        for loss in losses:
            self.note({"loss": loss}, 8, begins_update=True)

    def __add__(self, other):
        """What both know, as if by a sum over ranks."""
        theirs = other.epoch_sums(self.engine)
        return Seen([], {name: value + theirs[name] for name, value in self.epoch_sums(self.engine).items()})


def test_the_means_of_an_epoch_do_not_depend_on_where_it_was_interrupted():
    """Two ranks; when they go on, the first has what both had seen: the order of the sums is another."""
    for seed in range(50):
        losses = torch.rand(100, generator=torch.Generator().manual_seed(seed))
        whole = Seen(losses[0::2]) + Seen(losses[1::2])
        before = Seen(losses[0:50:2]) + Seen(losses[1:50:2])
        resumed = Seen(losses[50::2], before.epoch_sums(Seen.engine)) + Seen(losses[51::2])
        assert whole.of_epoch(Seen.engine) == resumed.of_epoch(Seen.engine) == {"loss": losses.double().mean().float().item()}


TWICE = "--trainer.val_check_interval=0.5"
EMA = ("--recipe", "engine/ema", "--trainer.callbacks.decay=0.8")


@pytest.mark.parametrize(
    ("stop", "updates", "options"),
    slow_except([(2, 8, []), (6, 16, EMA), (2, 4, [TWICE]), (9, 12, [TWICE, *EMA])], (6, 16, EMA)),
)
def test_a_validation_that_was_cut_short_is_made_anew(interrupted_and_whole, fit_here, stop, updates, options):
    stopped, whole = interrupted_and_whole(stop, "--data.eval_batch_size=4", *options, in_validation=True)  # four batches
    assert stopped.checkpoint()["fusion"]["updates"] == updates
    before = len(stopped.column("val/accuracy"))
    resumed = fit_here("--resume", stopped.folder)
    assert before == updates // (4 if TWICE in options else 8) - 1
    for name in ("val/accuracy", "val/loss", "train/loss_step", "train/loss_epoch"):
        assert resumed.column(name) == whole.column(name), name
    assert_same_end(resumed, whole)
    for part in ("current_model_state", "averaging_state"):
        assert difference_of(resumed.checkpoint().get(part), whole.checkpoint().get(part)) is None


@pytest.mark.parametrize("batch", slow_except([4, 8], 4))
def test_a_run_that_died_in_a_validation_after_which_a_checkpoint_was_due_makes_it_anew(tiny, fit_here, monkeypatch, tmp_path, batch):
    recipe, options = tiny(dropout=0.4), ["--checkpoint.every_updates=4", TWICE, "--data.eval_batch_size=4"]
    whole = fit_here("--recipe", recipe, *options, runs="whole")

    class Dies(SaveInTime):
        def on_validation_batch_start(self, trainer, module, *_):
            if module.updates == batch:
                raise RuntimeError("power cut")

    monkeypatch.setattr(command, "SaveInTime", Dies)
    with pytest.raises(RuntimeError, match="power cut"):
        fit_here("--recipe", recipe, *options, runs="died")
    monkeypatch.setattr(command, "SaveInTime", SaveInTime)
    died = Run(1, newest(tmp_path / "died"))
    assert died.checkpoint()["fusion"]["updates"] == batch
    resumed = fit_here("--resume", died.folder)
    for name in ("val/loss", "train/loss_step"):
        assert resumed.column(name) == whole.column(name), name
    assert_same_end(resumed, whole)


def test_a_signal_in_the_validation_after_the_last_update_of_all_lets_the_run_finish(tiny, fit_here, stop_after):
    stop_after(2, in_validation=True)
    run = fit_here("--recipe", tiny(), "--trainer.max_steps=4", TWICE, "--data.eval_batch_size=4", "--checkpoint.every_updates=4")
    assert run.status == 0
    assert run.results()["updates"] == 4
    assert len(run.column("val/loss")) == 1


def test_a_validation_within_an_update_is_not_cut_short(interrupted_and_whole, fit_here):
    """Whose gradients of the batches before would be lost."""
    options = ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=5", "--data.eval_batch_size=4"]
    stopped, whole = interrupted_and_whole(1, *options, in_validation=True)
    assert stopped.checkpoint()["fusion"]["updates"] == 3
    assert_same_end(fit_here("--resume", stopped.folder), whole)


def test_without_a_val_split_checkpoints_are_made_where_they_are_due(tiny, write_manifest, fit_here, monkeypatch, tmp_path):
    manifest = write_manifest(lambda i, row: dict(row, split="train" if row["split"] == "val" else row["split"]))

    class Dies(SaveInTime):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if module.updates == 5:
                raise RuntimeError("power cut")

    monkeypatch.setattr(command, "SaveInTime", Dies)
    with pytest.raises(RuntimeError, match="power cut"):
        fit_here("--recipe", tiny(manifest=manifest), TWICE, "--checkpoint.every_updates=4", runs="died")
    assert Run(1, newest(tmp_path / "died")).checkpoint()["fusion"]["updates"] == 4


def test_ctrl_c_in_the_very_last_update_lets_the_run_finish(tiny, fit_here, stop_after):
    stop_after(16)
    run = fit_here("--recipe", tiny())
    assert run.status == 0
    assert (run.folder / "results.json").is_file()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, REQUEUE), (signal.SIGINT, INTERRUPTED)])
def test_a_signal_while_the_test_split_is_scored_ends_with_its_status_and_the_command_to_go_on(
    tiny, fit_here, monkeypatch, capsys, request, number, status
):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process that a shell put in the background lacks
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    options = ["--recipe", tiny(), "--data.eval_batch_size=4"]
    whole = fit_here(*options, runs="whole")
    score = Engine.test_step

    def stopped(self, batch, batch_idx):
        signal.raise_signal(number)
        score(self, batch, batch_idx)

    monkeypatch.setattr(Engine, "test_step", stopped)
    run = fit_here(*options)
    assert run.status == status
    assert f"--resume {run.folder}" in capsys.readouterr().out
    assert not (run.folder / "results.json").exists()
    monkeypatch.undo()
    assert_same_end(fit_here("--resume", run.folder), whole)


def test_the_last_checkpoint_is_of_the_last_epoch_even_if_an_earlier_one_was_better(tiny, fit_here):
    run = fit_here("--recipe", tiny(), "--trainer.max_epochs=3", "--model.optimizer.init_args.lr=0")
    assert len(set(run.column("val/accuracy"))) == 1
    assert run.checkpoint("best")["fusion"]["updates"] == 8
    assert run.checkpoint("last")["fusion"]["updates"] == 24


# What resuming refuses.


@pytest.fixture
def stopped(tiny, fit_here, stop_after):
    stop_after(2)
    return fit_here("--recipe", tiny()).folder


def test_resuming_with_another_option_is_refused_with_the_difference(stopped, capsys):
    before = (stopped / "checkpoints" / "last.ckpt").read_bytes()
    with pytest.raises(SystemExit) as ended:
        run_command("fit", ["--resume", str(stopped), "--data.batch_size=8"])
    assert ended.value.code == 2
    assert "data.batch_size is 8 (was 16)" in capsys.readouterr().err
    assert (stopped / "checkpoints" / "last.ckpt").read_bytes() == before


@pytest.mark.parametrize("missing", ["recipe.yaml", "checkpoints/last.ckpt"])
def test_a_folder_that_is_no_run_is_refused_with_what_it_lacks(stopped, missing):
    (stopped / missing).unlink()
    with pytest.raises(UserError, match=re.escape(f"it has no {missing}")):
        command.fit(["--resume", str(stopped)])


def test_a_finished_run_resumes_to_its_own_result_and_log(tiny, fit_here):
    run = fit_here("--recipe", tiny(), "--trainer.max_epochs=1")
    columns = ("train/loss_step", "train/loss_epoch", "val/loss", "test/loss")
    before, result = run.checkpoint()["state_dict"], (run.folder / "results.json").read_text()
    log = [run.column(name) for name in columns]
    again = fit_here("--resume", run.folder)
    assert difference_of(again.checkpoint()["state_dict"], before) is None
    assert (again.folder / "results.json").read_text() == result
    assert [again.column(name) for name in columns] == log
    assert all(log)


# The signal, to a real process.


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_ctrl_c_ends_a_real_run_with_130_a_checkpoint_and_the_command_to_go_on(tiny, tmp_path, devices):
    script = str(REPOSITORY / "scripts/fit.py")
    begun = subprocess.Popen(
        [sys.executable, script, "--recipe", str(tiny(dropout=0.4)), "--trainer.max_epochs=100000", *(TWO if devices == 2 else [])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        for line in begun.stdout:
            if line.startswith("epoch 1/"):
                break
        os.killpg(begun.pid, signal.SIGINT)  # as a terminal does: to every rank
        out, err = begun.communicate(timeout=90)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(begun.pid, signal.SIGKILL)
    folder = newest(tmp_path / "runs")
    assert begun.returncode == 130, err
    assert "Traceback" not in err
    assert Run(130, folder).checkpoint()["fusion"]["updates"] > 0
    told = re.search(r"Interrupted after ([\d,]+) updates and saved. To resume:\n  python \S*fit\.py --resume (\S+)", out)
    assert told, out
    assert told[2] == str(folder)
