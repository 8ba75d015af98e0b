"""Checkpoints that are damaged, in time, or asked for by a signal; ranks that die; starting from weights; other numbers of ranks."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from safetensors.torch import save_file
from tiny_world import REPOSITORY, ROUNDING, TWO, Run, assert_same_end, furthest_weights, newest

import fusion.cli.fit as command
from fusion.cli.benchmark_kills import unlike
from fusion.data.checkpoint import find_damage, newest_whole, read_checkpoint
from fusion.errors import INTERRUPTED, LOST_RANK, REQUEUE, UserError
from fusion.training.checkpoints import AtomicCheckpointIO, BestAndLast
from fusion.training.steps import SaveInTime
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
    if find_damage(other) is None:
        assert unlike(read_checkpoint(other), held) is None


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
    assert "not what was written" in find_damage(other) or "not whole" in find_damage(other)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999))
def test_a_torn_file_is_found(checkpoint, share):
    path, content, _ = checkpoint
    torn = path.with_name("torn.ckpt")
    torn.write_bytes(content[: int(share * len(content))])
    assert "not whole" in find_damage(torn)
    with pytest.raises(UserError, match="is damaged"):
        read_checkpoint(torn)


def test_an_altered_weight_is_named(checkpoint):
    path, content, _ = checkpoint
    place = content.index(torch.arange(300.0).numpy().tobytes()) + 400
    altered = path.with_name("altered.ckpt")
    altered.write_bytes(content[:place] + b"\x01" + content[place + 1 :])
    assert re.search(r"data/0 is not what was written", find_damage(altered))


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
    assert "last.ckpt is damaged: it is not whole" in (told := capsys.readouterr().out)
    assert "going on from previous.ckpt" in told
    assert_same_end(resumed, whole)


def test_a_run_without_a_whole_checkpoint_is_refused_with_what_is_wrong(tmp_path):
    (tmp_path / "last.ckpt").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"last\.ckpt is damaged"):
        newest_whole(tmp_path)


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
        due.append(checkpoint.due(1))
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


# Signals.


def begun(recipe, tmp_path, *options):
    """A real run that has trained an epoch and saved it."""
    words = [sys.executable, str(REPOSITORY / "scripts/fit.py"), "--recipe", str(recipe), f"--runs={tmp_path / 'runs'}"]
    process = subprocess.Popen(
        [*words, "--trainer.max_epochs=100000", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            return process
    raise AssertionError(process.communicate()[1])


def ended(process, timeout_s=60):
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return out, err


def ranks(process):
    """The process numbers of the other ranks, which the first has started."""
    found = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout.splitlines()
    return [int(line.split()[0]) for line in found if "fit.py" in line]


def gone(pid, timeout_s=10):
    """Whether the process ends in time; one that only waits to be buried counts as ended."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def assert_saved_and_told(process, out, err, folder):
    assert process.returncode == REQUEUE, err
    assert "Traceback" not in err
    updates, named = re.search(r"Interrupted after ([\d,]+) updates and saved. To go on:\n  python \S*fit\.py --resume (\S+)", out).groups()
    assert Path(named) == folder
    assert Run(75, folder).checkpoint()["fusion"]["updates"] == int(updates.replace(",", "")) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=str)
def test_a_schedulers_signal_ends_a_run_with_75_a_checkpoint_and_the_command_to_go_on(tiny, tmp_path, number):
    process = begun(tiny(), tmp_path)
    process.send_signal(number)
    sent = time.monotonic()
    out, err = ended(process)
    assert time.monotonic() - sent < 20
    assert_saved_and_told(process, out, err, newest(tmp_path / "runs"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_alone_ends_both_together(tiny, tmp_path, rank):
    process = begun(tiny(), tmp_path, *TWO)
    (other,) = ranks(process)
    os.kill((process.pid, other)[rank], signal.SIGTERM)
    sent = time.monotonic()
    out, err = ended(process)
    assert time.monotonic() - sent < 20
    assert_saved_and_told(process, out, err, newest(tmp_path / "runs"))
    assert gone(other)


LATE = """
import os, signal
from fusion.cli.main import run
from fusion.training.checkpoints import BestAndLast
from fusion.training.steps import SaveInTime

where = os.environ["WHERE"]

def first(self, trainer, module, *rest, then=SaveInTime.on_train_batch_end):
    if module.updates == 10 and trainer.global_rank == 0:
        signal.raise_signal(signal.SIGINT)
    then(self, trainer, module, *rest)

def late(then):
    def reached(self, *args):
        if (self if where == "leaves" else args[0]).global_rank == 1:
            signal.raise_signal(signal.SIGINT)
        return then(self, *args)
    return reached

SaveInTime.on_train_batch_end = first
if where == "saves":
    BestAndLast.save_now = late(BestAndLast.save_now)
else:
    from lightning.pytorch import Trainer
    Trainer._teardown = late(Trainer._teardown)
run("fit")
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["saves", "leaves"])
def test_ctrl_c_that_reaches_a_rank_while_it_saves_or_leaves_as_another_asked_ends_both_together(tiny, tmp_path, monkeypatch, where):
    monkeypatch.setenv("WHERE", where)
    script = tmp_path / "late.py"
    script.write_text(LATE)
    words = [sys.executable, script, "--recipe", tiny(), *TWO, f"--runs={tmp_path / 'runs'}"]
    process = subprocess.Popen(
        [str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    out, err = ended(process)
    assert process.returncode == INTERRUPTED, err
    assert "Traceback" not in err
    assert "interrupted\n" not in err  # as at a second Ctrl-C
    assert re.search("Interrupted after 10 updates and saved", out), out + err


@pytest.mark.slow
def test_a_dead_rank_ends_the_other_with_a_message_and_no_hang(tiny, tmp_path):
    process = begun(tiny(), tmp_path, *TWO, "--trainer.strategy.init_args.timeout_s=15")
    (other,) = ranks(process)
    os.kill(other, signal.SIGKILL)
    sent = time.monotonic()
    _, err = ended(process)
    assert time.monotonic() - sent < 30
    assert process.returncode == LOST_RANK
    assert "rank 0 lost another rank" in err
    assert f"--resume {newest(tmp_path / 'runs')}" in err


@pytest.mark.slow
def test_a_rank_that_never_comes_ends_the_other_with_a_message(tiny, tmp_path):
    alone = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "none"}
    options = ["--recipe", str(tiny()), f"--runs={tmp_path / 'runs'}", *TWO, "--trainer.strategy.init_args.timeout_s=2"]
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts/fit.py"), *options],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | alone | rendezvous,
    )
    assert done.returncode == LOST_RANK, done.stderr
    assert "Traceback" not in done.stderr
    assert "rank 0 could not reach another rank" in done.stderr


@pytest.mark.slow
def test_a_silent_rank_ends_the_other_after_the_timeout(tiny, tmp_path):
    process = begun(tiny(), tmp_path, *TWO, "--trainer.strategy.init_args.timeout_s=20")
    (other,) = ranks(process)
    os.kill(other, signal.SIGSTOP)
    sent = time.monotonic()
    try:
        process.wait(timeout=60)
    finally:
        os.kill(other, signal.SIGKILL)
    assert 5 < time.monotonic() - sent < 55
    _, err = ended(process)
    assert process.returncode == LOST_RANK
    assert "rank 0 lost another rank" in err


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_where_the_whole_one_does(tiny, capsys):
    from fusion.cli.benchmark import benchmark

    arguments = ["--recipe", str(tiny(dropout=0.4)), "--trainer.max_epochs=10", "--checkpoint.every_updates=9", *TWO]
    assert benchmark(["kills", "--kills=2", *arguments]) == 0
    assert "after 2 kills: the same to the bit" in capsys.readouterr().out


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
    assert unlike(started.checkpoint()["state_dict"], held["state_dict"]) is None
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
    expected = {"missing": "no such file", "torn": "damaged", "foreign": "none of its 1 weights", "empty": "no weights", "code": "refused"}
    with pytest.raises(UserError, match=rf"weights\.pt: .*{expected[kind]}"):
        load_weights(built, path)
