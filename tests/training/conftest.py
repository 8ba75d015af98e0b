"""A world small enough to train in a second: 45 scenes, a tiny vision transformer, a one-layer BERT, a Concat head."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from tiny_world import BERT, FORKED, REPOSITORY, TWO, Run, assert_same_end, newest, one_of_two

import fusion.session as command
from fusion.cli.ray_worker import free_port
from fusion.data import Shapes
from fusion.data.prepare import prepared
from fusion.errors import INTERRUPTED, REQUEUE
from fusion.session import fit, silence_harmless_warnings
from fusion.settings.parser import FusionCLI
from fusion.training.callbacks.signals import SaveInTime


@pytest.fixture(scope="session")
def shapes_rows(tmp_path_factory):
    """(folder, rows) of the manifest; the test split has an odd number of samples."""
    shapes = Shapes(scenes=45, questions_per_scene=4, kinds=["existence", "colour"])
    folder, _ = prepared(shapes, None, tmp_path_factory.mktemp("cache"))
    with open(folder / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    in_test = [row for row in rows if row["split"] == "test"]
    if len(in_test) % 2 == 0:
        rows.remove(in_test[-1])
    return folder, rows


@pytest.fixture
def write_manifest(shapes_rows, tmp_path):
    """Writes the rows, changed by a function of (number, row), and gives the file."""
    folder, rows = shapes_rows

    def write(change=lambda i, row: row):
        changed = [change(i, dict(row, image=str(folder / row["image"]))) for i, row in enumerate(rows)]
        with open(tmp_path / "manifest.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(changed[0]))
            writer.writeheader()
            writer.writerows(changed)
        return tmp_path / "manifest.csv"

    return write


@pytest.fixture
def tiny(write_manifest, tmp_path):
    """Writes the recipe of the tiny world; `dropout` is the head's."""

    def write(dropout=0.0, manifest=None, name="tiny"):
        settings = {
            "seed_everything": 0,
            "runs": str(tmp_path / "runs"),
            "data": {"manifest": str(manifest or write_manifest()), "cache": str(tmp_path / "cache"), "batch_size": 16, "num_workers": 0},
            "model": {
                "image": {
                    "class_path": "fusion.encoders.TimmImage",
                    "init_args": {"name": "test_vit", "pretrained": False, "image_size": 32},
                },
                "text": {"class_path": "fusion.encoders.TransformersText", "init_args": {"config": BERT}},
                "head": {"class_path": "fusion.heads.Concat", "init_args": {"dim": 32, "dropout": dropout}},
                # Momentum, not Adam, which would turn a rounding difference of a gradient near zero into a whole step.
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9}},
                "schedule": {"class_path": "fusion.training.Cosine", "init_args": {"warmup": 2, "floor": 0.1}},
            },
            "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "log_every_n_steps": 1, "enable_progress_bar": True},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


@pytest.fixture
def parts(tiny):
    """(model, data, trainer) of the tiny world, made but not run."""

    def make(*options, callbacks=(), dropout=0.0, manifest=None):
        silence_harmless_warnings()
        torch.manual_seed(0)
        recipe = tiny(dropout=dropout, manifest=manifest)
        off = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
        return FusionCLI(["--recipe", str(recipe), *off, *options]).make(list(callbacks))

    return make


@pytest.fixture
def fit_here(tmp_path):
    """Runs the fit command in this process."""

    def run(*arguments, runs="runs"):
        status = fit([*map(str, arguments), *([] if "--resume" in arguments else [f"--runs={tmp_path / runs}"])])
        folder = Path(arguments[1]) if "--resume" in arguments else newest(tmp_path / runs)
        return Run(status, folder)

    return run


@pytest.fixture
def fit_command(tmp_path):
    """Runs scripts/fit.py in a process of its own; gives the run and what it printed."""

    def run(*arguments, runs="runs", timeout_s=200):
        done = subprocess.run(
            [sys.executable, str(REPOSITORY / "scripts/fit.py"), *map(str, arguments), f"--runs={tmp_path / runs}"],
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return Run(done.returncode, newest(tmp_path / runs)), done.stdout

    return run


@pytest.fixture(autouse=True)
def no_group_of_processes_is_left():
    """By a test of several ranks, or of one, in this process: the commands that others start would take its port or themselves for a rank
    of it, and `leave` would end this process."""
    names = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
    before = {name: os.environ.get(name) for name in names}
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture
def fit_on_two(tmp_path):
    """Runs fit of a recipe on two ranks, or goes on with a run's folder; gives the run and what it printed. They are forked from a process
    that has all modules loaded, since to load them takes longer than to train.
    """

    def run(recipe, *arguments, engine=TWO, runs="runs", timeout_s=100):
        goes_on = Path(recipe).is_dir()
        words = ["--resume", str(recipe), *arguments]
        if not goes_on:
            words = ["--recipe", str(recipe), *engine, *arguments, f"--runs={tmp_path / runs}"]
        port = free_port()
        prints = [tmp_path / f"{runs}_rank{rank}.txt" for rank in (0, 1)]
        ranks = [FORKED.Process(target=one_of_two, args=(rank, port, words, prints[rank])) for rank in (0, 1)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(timeout_s)
            rank.kill()
        told = [file.read_text() for file in prints]
        assert [rank.exitcode for rank in ranks] == [0, 0], "\n".join(told)
        return Run(0, Path(recipe) if goes_on else newest(tmp_path / runs)), "".join(told)

    return run


@pytest.fixture
def assert_resumes_to_the_bit(monkeypatch, fit_here):
    """Runs these options whole, and again with a request to end by SIGTERM's way after five updates, resumed: both end alike."""

    def ask(self, trainer, module, *rest, to_the_end=SaveInTime.on_train_batch_end):
        if module.updates == 5:
            self.requested = REQUEUE
        to_the_end(self, trainer, module, *rest)

    def check(*options):
        whole = fit_here(*options, runs="whole")
        with monkeypatch.context() as patched:
            patched.setattr(SaveInTime, "on_train_batch_end", ask)
            stopped = fit_here(*options, runs="stopped")
        assert stopped.status == 75
        assert_same_end(fit_here("--resume", stopped.folder), whole)

    return check


@pytest.fixture
def stop_after(monkeypatch):
    """Sends the process a Ctrl-C during the batch with this number in the run (from 1), of training or of validation, once."""

    def arrange(number, in_validation=False):
        class Stopping(SaveInTime):
            seen = 0

            def on_train_batch_start(self, trainer, module, batch, batch_idx):
                self.count(not in_validation)

            def on_validation_batch_start(self, *_):
                self.count(in_validation)

            def count(self, counted):
                self.seen += counted
                if counted and self.seen == number:
                    signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(command, "SaveInTime", Stopping)

    return arrange


@pytest.fixture
def interrupted_and_whole(tiny, fit_here, stop_after, monkeypatch):
    """Two runs of the same recipe: one stopped after a batch, resumed; the other never stopped."""

    def make(stop, *options, in_validation=False):
        recipe = tiny(dropout=0.4)
        whole = fit_here("--recipe", recipe, *options, runs="whole")
        stop_after(stop, in_validation)
        stopped = fit_here("--recipe", recipe, *options, runs="stopped")
        assert stopped.status == INTERRUPTED
        monkeypatch.setattr(command, "SaveInTime", SaveInTime)
        return stopped, whole

    return make
