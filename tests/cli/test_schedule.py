"""fusion schedule shows the rates that fit then uses, whatever the devices."""

import csv
import os
import re
import subprocess
import sys

import pytest
from small_runs import ROOT, TINY, InProcess

from fusion.cli.main import run
from fusion.errors import OUTPUT_CLOSED


@pytest.fixture(scope="module")
def drawn(world, monkeypatch_module):
    """Runs the command here; gives what it printed and the rows of its CSV."""
    from fusion.cli.schedule import schedule

    def run(*options, capsys):
        file = world / "schedule.csv"
        assert schedule([f"--csv={file}", *TINY, *options]) == 0
        with open(file, newline="") as rows:
            return capsys.readouterr().out, list(csv.DictReader(rows))

    return run


@pytest.fixture(scope="module")
def monkeypatch_module(world):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSION_CACHE", str(world / "cache"))
        yield patch


def test_the_rates_are_those_that_training_logs(drawn, capsys, trained):
    _, rows = drawn(capsys=capsys)
    with open(trained / "metrics.csv", newline="") as file:
        logged = [float(row["train/lr"]) for row in csv.DictReader(file) if row.get("train/lr")]
    assert [float(row["all of the model"]) for row in rows] == pytest.approx(logged)
    assert len(set(logged)) > 5


def test_one_device_and_many_have_the_same_schedule(drawn, capsys):
    one, rows = drawn(capsys=capsys)
    for options, words in (
        (["--trainer.devices=8", "--trainer.num_nodes=2"], "16 devices x 1"),
        (["--trainer.devices=2", "--data.device_batch_size=3"], "2 devices x 4 accumulated x 2"),
    ):
        many, theirs = drawn(*options, capsys=capsys)
        assert theirs == rows
        assert f"global batch 16 = {words}:" in many
        assert one.split(": ", 1)[1].splitlines()[-12:] == many.splitlines()[-12:]


def test_parts_with_rates_of_their_own_are_drawn_each(drawn, capsys):
    rates = '--model.rates={"image": {"factor": 0.1, "layer_decay": 0.5}}'
    told, rows = drawn(rates, capsys=capsys)
    assert re.search(r"image: WarmupStableDecay, \d+ updates of warm-up, peak 0\.0004; each layer 0\.5 times the one after it", told)
    for row in rows:
        assert float(row["image"]) == pytest.approx(0.1 * float(row["head"]))
        assert row["text"] == row["head"]


def test_max_steps_ends_it_earlier(drawn, capsys):
    told, rows = drawn("--trainer.max_steps=7", capsys=capsys)
    assert len(rows) == 7
    assert "7 in all" in told


@pytest.mark.slow
def test_a_reader_that_has_read_enough_is_no_mistake(world):
    words = [sys.executable, str(ROOT / "scripts/schedule.py"), *TINY]
    environment = os.environ | {"FUSION_CACHE": str(world / "cache")}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == OUTPUT_CLOSED


def test_another_broken_pipe_is_not_taken_for_it(monkeypatch):
    def lost(words):
        raise BrokenPipeError("a worker's")

    monkeypatch.setattr("fusion.cli.schedule.schedule", lost)
    with pytest.raises(BrokenPipeError, match="a worker's"):
        run("schedule", TINY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.devices=7"], "not a multiple of 7 devices"),
        (["--data.device_batch_size=3", "--trainer.accumulate_grad_batches=2"], "not both"),
        (["--data.device_batch_size=0"], "expected at least 1"),
        (["--trainer.max_epochs=-1"], "needs an end"),
    ],
)
def test_what_can_not_be_shared_out_is_refused(in_process: InProcess, options: list[str], message: str) -> None:
    status, told = in_process("schedule", [*TINY, *options])
    assert status == 2
    assert message in told
