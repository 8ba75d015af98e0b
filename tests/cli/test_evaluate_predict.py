"""fusion evaluate and fusion predict, and the same in Python."""

import csv
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from small_runs import InProcess, Run

import fusion
from fusion.errors import UserError


def test_evaluate_scores_the_test_split_as_training_did(command: Run, trained: Path) -> None:
    import json

    done = command("evaluate", "--run", str(trained), "--by", "kind")
    assert done.returncode == 0, done.stderr
    scores = json.loads((trained / "evaluation-test-by-kind.json").read_text())
    assert scores["all"]["accuracy"] == pytest.approx(json.loads((trained / "results.json").read_text())["test"]["accuracy"], abs=1e-6)
    assert scores["all"]["samples"] == scores["existence"]["samples"] + scores["colour"]["samples"]
    assert "existence" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--run", "RUN", "--by", "knd"], "Did you mean kind?"),
        (["--run", "RUN", "--split", "tst"], "Did you mean test?"),
        (["--run", "nowhere"], "there is no run nowhere"),
        (["--rnu", "RUN"], "Did you mean run?"),
    ],
)
def test_evaluate_tells_mistakes_in_one_line(in_process: InProcess, trained: Path, arguments: list[str], words: str) -> None:
    status, told = in_process("evaluate", [str(trained) if word == "RUN" else word for word in arguments])
    assert status == 2
    assert words in told


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_predict_writes_prediction_probabilities_and_presence(command: Run, trained: Path, world: Path, suffix: str) -> None:
    Image.new("RGB", (64, 64), "red").save(world / "red.png")
    (world / "ask.csv").write_text(
        "id,image,text\na,red.png,is there a red circle?\nb,,is there a red circle?\nc,red.png,\nd,gone.png,what?\n"
    )
    done = command("predict", "--run", str(trained), "--manifest", "ask.csv", "--out", f"out.{suffix}")
    assert done.returncode == 0, done.stderr
    if suffix == "csv":
        with open(world / "out.csv") as file:
            rows = list(csv.DictReader(file))
    else:
        rows = [{key: str(value).lower() for key, value in row.items()} for row in pq.read_table(world / "out.parquet").to_pylist()]
    assert [row["id"] for row in rows] == ["a", "b", "c"]
    assert [(row["present_image"].lower(), row["present_text"].lower()) for row in rows] == [
        ("true", "true"),
        ("false", "true"),
        ("true", "false"),
    ]
    for row in rows:
        assert sum(float(value) for key, value in row.items() if key.startswith("p_")) == pytest.approx(1, abs=1e-4)
    assert "1 sample" in done.stdout  # d, whose picture is missing
    assert "data_issues.csv" in done.stdout


def test_paths_pictures_arrays_and_bytes_give_the_same_answer(trained: Path, tmp_path: Path) -> None:
    model = fusion.load(str(trained))
    array = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    answers = model.predict(
        images=[tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(array), array, (tmp_path / "a.png").read_bytes()],
        texts=["is there a red circle?"] * 5,
    )
    assert np.ptp(answers.probabilities, axis=0).max() < 1e-6


def test_a_sample_may_lack_either_side_but_not_both(trained: Path) -> None:
    model = fusion.load(str(trained))
    answer = model.predict(images=[None, np.zeros((8, 8, 3), np.uint8)], texts=["is there a red circle?", None])
    assert answer.present["image"].tolist() == [False, True]
    assert np.isfinite(answer.probabilities).all()
    with pytest.raises(UserError, match="sample 1 has neither"):
        model.predict(images=[None, None], texts=["red?", None])


def test_a_checkpoint_alone_is_enough(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_CACHE", str(tmp_path / "nothing"))
    alone = tmp_path / "elsewhere.ckpt"
    alone.write_bytes((trained / "checkpoints" / "best.ckpt").read_bytes())
    texts = ["is there a red circle?"]
    assert fusion.load(str(alone)).predict(texts=texts).labels == fusion.load(str(trained)).predict(texts=texts).labels


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"fusion": {"format": 1}, "payload": Path}, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match="refused to load"):
        fusion.load(str(tmp_path / "bad.ckpt"))
