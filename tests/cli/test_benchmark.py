"""fusion benchmark runs as its usage says."""

import csv
import re
from pathlib import Path

import pytest
from small_runs import TINY, Run


def test_the_overhead_of_the_fit_loop_is_measured_against_two_bare_loops(here: Run) -> None:
    done = here("benchmark", "overhead", "--rounds=2", "--updates=3", *TINY)
    assert done.returncode == 0, done.stderr
    assert "2 rounds of 3 updates of 16 samples" in done.stdout
    for loop in ("the whole fit loop", "bare loop, same loader", "bare loop, batches in memory"):
        assert re.search(rf"^{loop} +[1-9][\d,]*", done.stdout, re.MULTILINE), done.stdout
    assert len(re.findall(r"[\d.]+  \([\d.]+ to [\d.]+\)", done.stdout)) == 2


def test_memory_is_measured_with_activations_kept_and_computed_again(command: Run) -> None:
    done = command("benchmark", "memory", "--rounds=1", *TINY)
    assert done.returncode == 0, done.stderr
    peaks = {name: float(mib) for name, mib in re.findall(r"^(\S.*\S) +([\d.]+) +[\d.]+ +[\d.]+ +[\d.]+$", done.stdout, re.MULTILINE)}
    assert list(peaks) == ["all kept", *(f"{part} computed again" for part in ("image", "text", "head", "all"))]
    assert 0 < peaks["all computed again"] < peaks["all kept"]


@pytest.mark.slow
def test_one_process_and_several_are_measured_beside_each_other(command: Run, tmp_path: Path) -> None:
    done = command("benchmark", "ranks", "--compress", "sign", f"--csv={tmp_path / 'curves.csv'}", *TINY, "--trainer.max_steps=4")
    assert done.returncode == 0, done.stderr
    sent = {name: re.search(rf"^{name} +[\d,]+ +[\d.]+ +([\d,]+)", done.stdout, re.MULTILINE) for name in ("2 ranks", "2 ranks, sign")}
    numbers = {name: int(found.group(1).replace(",", "")) for name, found in sent.items() if found}
    assert numbers["2 ranks"] > 25 * numbers["2 ranks, sign"] > 0
    assert re.search(r"efficiency of 2 ranks of one core each: [\d.]+ of 2 runs", done.stdout)
    with open(tmp_path / "curves.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert all(float(loss) > 0 for row in rows for loss in row.values() if loss != row["update"])


@pytest.mark.slow
def test_heads_are_compared_on_shares_of_the_data_and_finished_runs_are_kept(command: Run, tmp_path: Path) -> None:
    asked = ["pretrained", "--heads=Logit*", "--seeds=2", "--shares", "40", "all", f"--csv={tmp_path / 'scores.csv'}"]
    done = command("benchmark", *asked, *TINY)
    assert done.returncode == 0, done.stderr
    accuracy = r"0\.\d{3} \(0\.\d{3} to 0\.\d{3}\)"
    assert re.search(rf"^LogitMean( +{accuracy}){{4}}$", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^upper bound \(text only\) +0\.\d{4} +0\.\d{4}$", done.stdout, re.MULTILINE)
    with open(tmp_path / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["share"], row["seed"]) for row in rows] == [("40", "0"), ("all", "0"), ("40", "1"), ("all", "1")]
    assert int(rows[0]["updates"]) == 2  # whole batches of 16 out of 40 samples
    assert int(rows[1]["updates"]) > 2
    again = command("benchmark", *asked, *TINY)
    assert again.stdout == "\n" + done.stdout.partition("\n\n")[2]
