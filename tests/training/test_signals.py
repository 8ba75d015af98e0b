"""Runs that are asked to end by a signal, and ranks that die, never come or fall silent."""

import os
import re
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from tiny_world import REPOSITORY, TWO, Run, newest

from fusion.data.sampler import draw_seed
from fusion.errors import INTERRUPTED, LOST_RANK, REQUEUE
from fusion.session import lost_a_rank
from fusion.training import DDP
from fusion.training.callbacks.signals import SeedEachStep


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
    updates, named = re.search(
        r"Interrupted after ([\d,]+) updates and saved. To resume:\n  python \S*fit\.py --resume (\S+)", out
    ).groups()
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
from fusion.training.callbacks.checkpoints import BestAndLast
from fusion.training.callbacks.signals import AgreeFirst

where = os.environ["WHERE"]

def first(self, trainer, module, *rest, then=AgreeFirst.on_before_optimizer_step):
    if module.updates == 9 and trainer.global_rank == 0:
        signal.raise_signal(signal.SIGINT)
    then(self, trainer, module, *rest)

def late(then):
    def reached(self, *args):
        if (self if where == "leaves" else args[0]).global_rank == 1:
            signal.raise_signal(signal.SIGINT)
        return then(self, *args)
    return reached

AgreeFirst.on_before_optimizer_step = first
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


def test_a_strategy_that_lost_a_rank_moves_nothing_when_it_ends(monkeypatch):
    """On a GPU the copies would wait for the sum of gradients that is never done."""
    moved = []
    monkeypatch.setattr(DDPStrategy, "teardown", lambda self: moved.append(self))
    monkeypatch.setattr(DDPStrategy, "on_exception", lambda self, exception: None)
    for error, ends in (RuntimeError("[gloo] Connection closed by peer"), 0), (RuntimeError("mat1 and mat2"), 1), (KeyboardInterrupt(), 1):
        moved.clear()
        strategy = DDP()
        with monkeypatch.context() as among_ranks:
            among_ranks.setattr("torch.distributed.is_initialized", lambda: True)
            strategy.on_exception(error)
        strategy.teardown()
        assert len(moved) == ends


ALONE = """
import signal
from fusion.cli.main import run
from fusion.training import Engine

def stopped(self, *args, then=Engine.test_step):
    if self.trainer.global_rank == 1:
        signal.raise_signal(signal.SIGINT)
    then(self, *args)

Engine.test_step = stopped
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background, such as these tests
run("fit")
"""


@pytest.mark.slow
def test_a_rank_that_ctrl_c_ends_alone_while_the_test_split_is_scored_waits_for_nobody(tiny, tmp_path):
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    words = [sys.executable, script, "--recipe", tiny(), *TWO, f"--runs={tmp_path / 'runs'}"]
    process = subprocess.Popen(
        [str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    _, err = ended(process)
    assert process.returncode != 0, err
    assert "Traceback" not in err
    assert f"--resume {newest(tmp_path / 'runs')}" in err


@pytest.mark.slow
def test_a_dead_rank_ends_the_other_with_a_message_and_no_hang(tiny, tmp_path):
    process = begun(tiny(), tmp_path, *TWO, "--trainer.strategy.init_args.timeout_s=15")
    (other,) = ranks(process)
    os.kill(other, signal.SIGKILL)
    sent = time.monotonic()
    _, err = ended(process)
    assert time.monotonic() - sent < 30
    assert process.returncode == LOST_RANK, err
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


@pytest.mark.parametrize(
    ("words", "lost"),
    [
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5131", True),
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 6000ms for recv operation", True),
        ("Application timeout caused pair closure", True),
        ("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)", False),
    ],
)
def test_a_lost_rank_is_told_from_other_errors_by_what_gloo_says(monkeypatch, words, lost):
    assert not lost_a_rank(RuntimeError(words))  # a rank alone
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    assert lost_a_rank(RuntimeError(words)) == lost


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
    assert process.returncode == LOST_RANK, err
    assert "rank 0 lost another rank" in err


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_where_the_whole_one_does(tiny, capsys):
    from fusion.cli.benchmark import benchmark

    arguments = ["--recipe", str(tiny(dropout=0.4)), "--trainer.max_epochs=10", "--checkpoint.every_updates=9", *TWO]
    assert benchmark(["kills", "--kills=2", *arguments]) == 0
    assert "after 2 kills: bitwise equal" in capsys.readouterr().out


def test_seeding_draws_as_torch_does_without_the_cost_for_devices_that_are_not_used(monkeypatch):
    traces = []
    monkeypatch.setattr(traceback, "format_stack", lambda: traces.append(1) or [])  # torch's, for each kind of device that isn't
    trainer, module = SimpleNamespace(current_epoch=1, global_rank=0), SimpleNamespace(device=torch.device("cpu"))
    SeedEachStep(7).on_train_batch_start(trainer, module, None, 3)
    drawn = torch.rand(4)
    assert not traces
    torch.manual_seed(draw_seed(7, 1, 3, 0))
    assert torch.equal(drawn, torch.rand(4))
