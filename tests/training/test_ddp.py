"""Two processes train what one trains."""

import re
import subprocess
import sys

import pytest
from slow_cases import slow_except
from tiny_world import ROUNDING, TWO, furthest, furthest_weights

COUNTED = """
import sys, torch.distributed as dist
from fusion.session import fit
from fusion.exit import leave
from fusion.training.callbacks.signals import SaveInTime

calls = [0]

def counted(exchange):
    def count(*args, **options):
        calls[-1] += 1
        return exchange(*args, **options)
    return count

def end_of_update(*args, to_the_end=SaveInTime.on_train_batch_end):
    to_the_end(*args)
    calls.append(0)

for name in ("all_reduce", "all_gather", "broadcast", "barrier", "broadcast_object_list"):
    setattr(dist, name, counted(getattr(dist, name)))
SaveInTime.on_train_batch_end = end_of_update
status = fit(sys.argv[1:])
print("exchanges", calls[1:-1], flush=True)
leave(status, together=True)
"""


@pytest.mark.slow
def test_two_processes_follow_the_loss_of_one_and_score_every_test_sample_once(tiny, shapes_rows, fit_here, fit_command):
    recipe = tiny()
    one = fit_here("--recipe", recipe, runs="one")
    two, told = fit_command("--recipe", recipe, *TWO, runs="two")
    in_test = sum(row["split"] == "test" for row in shapes_rows[1])
    assert in_test % 2 == 1
    assert "2 devices x 8" in told
    assert re.search(rf"this model .* {in_test}\n", told)
    assert told.count("global batch") == told.count("run folder") == 1  # one rank speaks
    curves = one.column("train/loss_step"), two.column("train/loss_step")
    weights = furthest_weights(one, two)
    print(f"largest difference: loss {furthest(*curves):.2e}, weights {weights:.2e}, after {len(curves[0])} updates")
    assert furthest(*curves) < ROUNDING
    assert max(curves[0]) - min(curves[0]) > 0.1  # it went somewhere
    assert weights < ROUNDING
    assert one.column("train/loss_epoch") == pytest.approx(two.column("train/loss_epoch"), abs=ROUNDING)
    scores, theirs = one.results(), two.results()
    assert scores["updates"] == theirs["updates"]
    of_probabilities = ("loss", "log_loss", "brier", "calibration_error", "auroc", "average_precision")  # the others count hits
    for name, value in scores["test"].items():
        assert theirs["test"][name] == (pytest.approx(value, abs=ROUNDING) if name in of_probabilities else value), name
    # A share of an odd number of samples: with one of them counted twice it would be one of an even number.
    hits = theirs["test"]["accuracy"] * in_test
    assert hits == pytest.approx(round(hits), abs=1e-4)


@pytest.mark.slow
def test_two_processes_that_accumulate_two_batches_train_what_one_trains(tiny, fit_here, fit_on_two):
    recipe = tiny()
    one = fit_here("--recipe", recipe, runs="one")
    two, told = fit_on_two(recipe, "--trainer.accumulate_grad_batches=2", runs="two")
    assert "2 devices x 2 accumulated x 4" in told
    assert one.results()["updates"] == two.results()["updates"]
    weights = furthest_weights(one, two)
    print(f"largest difference with accumulation: weights {weights:.2e}")
    assert weights < ROUNDING
    assert one.column("train/loss_epoch") == pytest.approx(two.column("train/loss_epoch"), abs=ROUNDING)
    assert one.column("val/loss") == pytest.approx(two.column("val/loss"), abs=ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize(("logged", "expected"), [(1000, 1), (1, 2)], ids=["not logged", "logged"])
def test_an_update_waits_for_the_other_rank_once_beside_its_gradients_and_once_for_the_log(tiny, tmp_path, logged, expected):
    script = tmp_path / "counted.py"
    script.write_text(COUNTED)
    options = ["--recipe", tiny(), *TWO, "--trainer.max_steps=5", f"--trainer.log_every_n_steps={logged}", "--trainer.limit_val_batches=0"]
    done = subprocess.run([str(word) for word in (sys.executable, script, *options)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"exchanges {[expected] * 4}" in done.stdout


def test_accumulated_batches_train_what_one_whole_batch_trains(tiny, fit_here):
    recipe = tiny()
    whole = fit_here("--recipe", recipe, runs="whole")
    accumulated = fit_here("--recipe", recipe, "--trainer.accumulate_grad_batches=4", runs="accumulated")
    assert whole.results()["updates"] == accumulated.results()["updates"]
    assert furthest_weights(whole, accumulated) < ROUNDING


WEIGHTED = ["--model.task.class_weights=balanced", "--model.task.label_smoothing=0.1", "--trainer.max_epochs=1"]


def one_in_ten(i, row):
    return row | {"label": "rare" if i % 10 == 0 else "usual"}


@pytest.mark.parametrize("balance", slow_except(["null", "MMPareto", "UnimodalLosses", "OGMGE"], "MMPareto"))
def test_weighted_means_are_over_the_whole_update_however_it_is_accumulated(tiny, write_manifest, fit_here, balance):
    recipe = tiny(manifest=write_manifest(one_in_ten))
    options = ["--recipe", recipe, *WEIGHTED, f"--model.balance={balance}"]
    whole = fit_here(*options, runs="whole")
    accumulated = fit_here(*options, "--data.device_batch_size=2", runs="accumulated")
    assert furthest_weights(whole, accumulated) < ROUNDING / 10
    assert whole.column("train/loss_step") == pytest.approx(accumulated.column("train/loss_step"), abs=ROUNDING)


@pytest.mark.slow
def test_weighted_means_are_over_the_whole_update_on_two_ranks_too(tiny, write_manifest, fit_here, fit_on_two):
    recipe = tiny(manifest=write_manifest(one_in_ten))
    options = [*WEIGHTED, "--model.balance=UnimodalLosses"]
    one = fit_here("--recipe", recipe, *options, runs="one")
    two, _ = fit_on_two(recipe, *options, "--data.device_batch_size=4", runs="two")
    assert furthest_weights(one, two) < ROUNDING / 10


def test_accumulation_follows_from_what_a_device_takes_at_a_time(parts):
    model, data, trainer = parts("--data.device_batch_size=5", "--trainer.max_epochs=1")
    sizes = []
    step = model.training_step
    model.training_step = lambda batch, batch_idx: sizes.append(len(batch.target)) or step(batch, batch_idx)
    trainer.fit(model, datamodule=data)
    assert trainer.accumulate_grad_batches == 4
    assert sizes == [4] * 32
    assert model.updates == 8


def test_processes_of_a_machine_decode_images_once_and_leave_no_pixels_behind(tiny, tmp_path, fit_on_two):
    fit_on_two(tiny(), "--trainer.max_steps=2")
    assert list((tmp_path / "cache").glob("checked-*.parquet"))  # as written with shared pixels
    assert not list((tmp_path / "cache").glob("pixels-*"))
