"""fusion benchmark runs as its usage says."""

import csv
import re
from pathlib import Path

import pytest
from small_runs import TINY, InProcess, Run

from fusion.benchmarks.findings import Finding
from fusion.benchmarks.gpu import findings
from fusion.benchmarks.gpu_runs import Bounds, Runs, loss_finding
from fusion.heads import available


def test_the_overhead_of_the_fit_loop_is_measured_against_two_bare_loops(here: Run) -> None:
    done = here("benchmark", "overhead", "--rounds=2", "--updates=3", *TINY)
    assert done.returncode == 0, done.stderr
    assert "2 rounds of 3 updates of 16 samples" in done.stdout
    for loop in ("the whole fit loop", "bare loop, same loader", "bare loop, batches in memory"):
        assert re.search(rf"^{loop} +[1-9][\d,]*", done.stdout, re.MULTILINE), done.stdout
    assert len(re.findall(r"[\d.]+  \([\d.]+ to [\d.]+\)", done.stdout)) == 2


@pytest.mark.slow
def test_memory_is_measured_with_activations_stored_and_recomputed(command: Run) -> None:
    done = command("benchmark", "memory", "--rounds=1", *TINY)
    assert done.returncode == 0, done.stderr
    peaks = {name: float(mib) for name, mib in re.findall(r"^(\S.*\S) +([\d.]+) +[\d.]+ +[\d.]+ +[\d.]+$", done.stdout, re.MULTILINE)}
    assert list(peaks) == ["all stored", *(f"{part} recomputed" for part in ("image", "text", "head", "all"))]
    assert 0 < peaks["all recomputed"] < peaks["all stored"]


@pytest.mark.slow
def test_reading_a_large_manifest_is_measured_beside_pyarrow_alone(command: Run) -> None:
    done = command("benchmark", "table", "--rows=20000", "--rounds=1")
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"^(\S.*\S) +\d+\.\d\d +([\d.]+) \([\d.]+ to [\d.]+\) +\d+ +[\d.]+$", done.stdout, re.MULTILINE))
    assert list(rows) == ["a manifest", "a manifest, texts in quotes"]
    assert all(float(ratio) > 0 for ratio in rows.values())
    assert "unknown option --row" in command("benchmark", "table", "--row").stderr


@pytest.mark.slow
def test_one_process_and_several_are_measured_beside_each_other(command: Run, tmp_path: Path) -> None:
    done = command("benchmark", "ranks", "--compress", "sign", f"--csv={tmp_path / 'curves.csv'}", *TINY, "--trainer.max_steps=4")
    assert done.returncode == 0, done.stderr
    sent = {name: re.search(rf"^{name} +[\d,]+ +[\d.]+ +([\d,]+)", done.stdout, re.MULTILINE) for name in ("2 ranks", "2 ranks, sign")}
    numbers = {name: int(found.group(1).replace(",", "")) for name, found in sent.items() if found}
    assert numbers["2 ranks"] > 25 * numbers["2 ranks, sign"] > 0
    assert re.search(r"efficiency of 2 ranks of one core each: [\d.]+ of 2 independent runs", done.stdout)
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


@pytest.mark.slow
def test_a_student_is_compared_with_itself_by_a_teacher_over_seeds(command: Run, trained: Path) -> None:
    done = command("benchmark", "distilled", "--seeds=2", "--teachers=2", "--teacher=--model.head.dim=48", *TINY)
    assert done.returncode == 0, done.stderr
    sizes = [int(size.replace(",", "")) for size in re.findall(r"(?:^teacher|^student): ([\d,]+) parameters", done.stdout, re.MULTILINE)]
    assert len(sizes) == 3
    assert sizes[0] == sizes[1] > sizes[2]
    line = r" +(0\.\d{4}) +(0\.\d{4}) +([+-]0\.\d{4}) +(0\.\d{4}) +(0\.\d{4}) +([+-]0\.\d{4})$"
    rows = [[float(x) for x in re.findall(rf"^{name}{line}", done.stdout, re.MULTILINE)[0]] for name in ("seed 0", "seed 1", "mean")]
    for row in rows:
        assert [row[2], row[5]] == pytest.approx([row[1] - row[0], row[4] - row[3]], abs=2e-4)
    assert rows[2] == pytest.approx([(a + b) / 2 for a, b in zip(*rows[:2], strict=True)], abs=2e-4)
    assert re.search(r"^95 % interval +\S+ to \S+ +\S+ to \S+$", done.stdout, re.MULTILINE)
    given = command("benchmark", "distilled", "--seeds=2", "--given", str(trained), *TINY, "--data.train_samples=64")
    assert given.returncode == 0, given.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds=1"], "--seeds is 1; expected at least 2"),
        (["--teachers=0"], "--teachers is 0; expected at least 1"),
        (["--teacher=--model.head=Gated", "--given", "run"], "give either --teacher (options of the teachers to train) or --given"),
        (["--given", "nowhere"], "nowhere has no results.json; expected the folder of a finished run"),
    ],
)
def test_a_comparison_with_a_teacher_that_cannot_be_meant_is_rejected(in_process: InProcess, options: list[str], message: str) -> None:
    status, told = in_process("benchmark", ["distilled", *options, *TINY])
    assert status == 2
    assert message in told


@pytest.mark.slow
def test_the_page_of_a_machine_without_gpus_says_so_and_judges_what_needs_none(command) -> None:
    done = command("benchmark", "gpu", "--scenes", "80", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert sum("no GPU here" in line for line in lines) == 1
    assert not any(line.startswith("FAIL") for line in lines)
    for what in (
        "loss of fp16",
        "overflow",
        "Muon killed and resumed",
        f"{len(available())} heads in fp16",
        "loss of two ranks, compress=sign",
    ):
        assert any(line.startswith(f"pass   {what}: ") for line in lines), done.stdout
    assert any(line.startswith("pass   a rank that lost another: status 69") for line in lines)
    assert any("needs a GPU" in line for line in lines)


def test_a_run_that_failed_or_strays_from_the_reference_is_told_with_its_error(tmp_path) -> None:
    runs = Runs(tmp_path, scenes=10, on_gpu=False)

    def ended(name: str, losses: list[float], log: str = "fine\n") -> None:
        folder = tmp_path / name / "quickstart" / "1"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text("step,train/loss_step\n" + "".join(f"{i},{loss}\n" for i, loss in enumerate(losses)))
        runs.log(name).write_text(log)

    ended("reference", [2.0] * 12)
    ended("near", [2.001] * 12)
    ended("far", [2.0] + [3.0] * 11)
    ended("nan", [2.0] + [float("nan")] * 11)
    ended("broken", [], "plan\nerror: no such card\nmore\n")
    bounds = Bounds(first=0.01, last=0.1)
    good = {name: loss_finding(runs, name, 0, bounds, "reference").good for name in ("near", "far", "nan")}
    assert good == {"near": True, "far": False, "nan": False}
    finding = loss_finding(runs, "broken", 2, bounds, "reference")
    assert finding.good is False
    assert "status 2: error: no such card" in finding.detail


def test_a_check_that_breaks_is_a_failure_and_loses_no_other(capsys) -> None:
    def broken():
        yield Finding(True, "before", "it broke")
        raise RuntimeError("CUDA error: out of memory\nand more")

    found = list(findings(broken))
    assert [finding.good for finding in found] == [True, False]
    assert "RuntimeError: CUDA error: out of memory" in str(found[1])
    assert "Traceback" in capsys.readouterr().err
