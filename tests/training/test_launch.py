"""fusion launch on a cluster of this machine alone: the same run, which outlives its workers and the command."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_world import REPOSITORY, Run, assert_same_end, newest

from fusion.cli.launch import check_resources, launch
from fusion.errors import INTERRUPTED, UserError

LAUNCH = [sys.executable, str(REPOSITORY / "scripts/launch.py"), "--engine", "ray", "--workers=2"]
LONG = ["--trainer.max_epochs=20", "--checkpoint.every_updates=5", "--trainer.accelerator=cpu"]


def fit_of(rank, tmp_path):
    """The process number of a worker's fit."""
    marks = str(tmp_path).encode(), f"\0RANK={rank}\0".encode()
    for process in Path("/proc").glob("[0-9]*"):
        if marks[0] in (process / "cmdline").read_bytes() and marks[1] in (process / "environ").read_bytes():
            return int(process.name)
    raise AssertionError("not there")


def until_an_epoch_is_over(process):
    """What is told until then."""
    told = ""
    for line in process.stdout:
        told += line
        if line.startswith("epoch "):
            return told
    raise AssertionError(told + process.communicate()[1])


@pytest.mark.slow
def test_a_run_whose_worker_is_killed_and_which_is_then_told_to_end_and_launched_again_ends_like_any_other(tiny, tmp_path, fit_on_two):
    recipe = tiny(dropout=0.4)
    whole, _ = fit_on_two(recipe, *LONG, runs="whole")
    words = [*LAUNCH, "--recipe", str(recipe), *LONG, f"--runs={tmp_path / 'runs'}"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until_an_epoch_is_over(process)
    os.kill(fit_of(1, tmp_path), signal.SIGKILL)
    again = until_an_epoch_is_over(process)
    while "of them done; schedule" not in again:  # the plan of a run that goes on
        again += until_an_epoch_is_over(process)
    assert "rank 0 lost another rank" in again
    process.send_signal(signal.SIGINT)  # which Ray blocks in what it starts
    told, err = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, told + err
    folder = newest(next((tmp_path / "runs").iterdir()))
    assert f"launch.py --engine ray --workers 2 --cpus 1 --restarts 3 --resume {folder}\n" in told
    done = subprocess.run([*LAUNCH, "--resume", str(folder)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 devices x 8" in done.stdout
    assert_same_end(Run(0, folder), whole)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--engine=slurm"], r"--engine: invalid choice: 'slurm' \(choose from '?ray'?\)"),
        (["--engine=ray", "--workers=0"], "--workers=0; expected at least 1"),
        (["--engine=ray", "--recipe=quickstrat"], "Did you mean .*quickstart"),
        (["--engine=ray", "--resume=nowhere"], "can't resume 'nowhere'"),
        (["--engine=ray", "--recipe=quickstart", "--worker=2"], "unknown option --worker. Did you mean workers"),
    ],
)
def test_what_cannot_be_launched_is_told_before_anything_is_started(options, told):
    with pytest.raises(UserError, match=told):
        launch(options)


@pytest.mark.parametrize(
    ("accelerator", "workers", "cpus", "gpus", "told"),
    [
        ("gpu", 2, 1, 0, "requests trainer.accelerator=gpu, but the cluster has no GPU"),
        ("auto", 0, 1, 0, "number of CPU workers with --workers=N"),
        ("auto", 3, 1, 2, "has 2 GPUs; to train on CPUs"),
        ("cpu", 1, 6, 0, r"room for 0 \(CPUs there: 4, 4\)"),
        ("auto", 2, 4, 2, r"room for 1 "),
    ],
)
def test_what_the_cluster_has_no_room_for_is_refused(accelerator, workers, cpus, gpus, told):
    nodes = [{"CPU": 4.0, "GPU": float(gpus)}, {"CPU": 4.0}]
    with pytest.raises(UserError, match=told):
        check_resources(accelerator, workers, cpus, gpus, nodes)


@pytest.mark.slow
def test_more_workers_than_the_cluster_has_room_for_are_refused(tiny):
    with pytest.raises(UserError, match=r"1000 workers of 1 CPUs each, but the cluster has room for \d+"):
        launch(["--engine=ray", "--workers=1000", "--recipe", str(tiny())])
