"""fusion evaluate and fusion predict, and the same in Python."""

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from small_runs import TINY, InProcess, Run

import fusion
from fusion.errors import UserError
from fusion.processing.raw_columns import text_column


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
def test_predict_writes_prediction_probabilities_and_presence(here: Run, trained: Path, world: Path, suffix: str) -> None:
    Image.new("RGB", (64, 64), "red").save(world / "red.png")
    (world / "ask.csv").write_text(
        "id,image,text\na,red.png,is there a red circle?\nb,,is there a red circle?\nc,red.png,\nd,gone.png,what?\n"
    )
    done = here("predict", "--run", str(trained), "--manifest", "ask.csv", "--out", f"out.{suffix}")
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


def test_evaluate_and_predict_read_a_manifest_as_the_run_was_told_to(here: Run, trained: Path, world: Path) -> None:
    run = world / "own-format"
    shutil.copytree(trained, run)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"]["format"] = {"encoding": "cp1252", "separator": None, "quotes": None, "missing": ["n/a"]}
    recipe["data"]["columns"] |= {"id": None, "text": "question"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    classes = fusion.load(str(run)).processor.task.names
    rows = [("id", "image", "question", "label")]
    rows += [("7", "", 'café "red?', classes[0]), ("7", "", "n/a", classes[1]), ("7", "", 'blue?"', classes[1])]
    (world / "ask.tsv").write_bytes("".join("\t".join(row) + "\n" for row in rows).encode("cp1252"))
    for name, words in (("predict", ["--out=own.csv"]), ("evaluate", [])):
        done = here(name, "--run", str(run), "--manifest", "ask.tsv", *words)
        assert done.returncode == 0, done.stderr
        assert "1 sample dropped" in done.stdout, name
    (world / "ask.csv").write_bytes(f"image;question;label\n;red?;{classes[0]}\n;blue?;{classes[1]}\n".encode())
    for name, words in (("predict", ["--out=own.csv"]), ("evaluate", [])):
        assert "note: ask.csv: its cells are separated by ';'" in here(name, "--run", str(run), "--manifest", "ask.csv", *words).stdout


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
    with pytest.raises(UserError, match="sample 1 has none"):
        model.predict(images=[None, None], texts=["red?", None])


TEXTS = ["is there a red circle?", "nan", "3", "is there a blue square?", "3"]
COLUMNS = {
    "tuple": tuple(TEXTS),
    "iterator": lambda: iter(TEXTS),
    "generator": lambda: (text for text in TEXTS),
    "numpy text": np.array(TEXTS),
    "numpy objects": np.array(TEXTS, dtype=object),
    "series": pd.Series(TEXTS),
    "filtered series": pd.Series([*TEXTS[:2], "left out", *TEXTS[2:]], index=range(10, 16)).drop(12),
    "series by name": pd.Series(TEXTS, index=list("abcab")),
    "categories": pd.Series(TEXTS, dtype="category"),
    "mixed": [TEXTS[0], "nan", 3.0, TEXTS[3], np.int64(3)],
    "arrow": pa.array(TEXTS),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_any_column_of_texts_gives_the_answers_of_a_list(trained: Path, kind: str) -> None:
    model = fusion.load(str(trained))
    values = COLUMNS[kind]() if callable(COLUMNS[kind]) else COLUMNS[kind]
    assert np.array_equal(model.predict(texts=values).probabilities, model.predict(texts=TEXTS).probabilities)


@pytest.mark.parametrize("null", [None, np.nan, float("nan"), np.float32("nan"), pd.NA, pd.NaT, np.datetime64("NaT"), "", " "], ids=repr)
def test_what_is_missing_in_python_is_missing(trained: Path, null: object) -> None:
    model = fusion.load(str(trained))
    pixels = np.zeros((8, 8, 3), np.uint8)
    answer = model.predict(images=[pixels, null], texts=[null, "red?"])
    assert answer.present["image"].tolist() == [True, False]
    assert answer.present["text"].tolist() == [False, True]
    assert np.array_equal(answer.probabilities, model.predict(images=[pixels, None], texts=[None, "red?"]).probabilities)
    with pytest.raises(UserError, match="sample 0 has none"):
        model.predict(texts=[null])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.bytes_(b"red"), "its text is a bytes_"),
        (np.zeros(1, dtype=[("a", "i4")])[0], "its text is a void"),
        (1 + 2j, "its text is a complex"),
        (np.complex64(1), "its text is a complex64"),
        ([1], "its text is a list"),
        ("is there \ud800?", "sample 1: not UTF-8 (lone surrogate U+D800"),
    ],
    ids=["bytes", "structure", "complex", "complex64", "list", "surrogate"],
)
def test_what_has_no_text_is_rejected_and_not_read_as_its_repr(trained: Path, value: object, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        fusion.load(str(trained)).predict(texts=["red?", value])


def test_narrow_floats_of_arrow_have_the_digits_they_have_in_numpy(trained: Path) -> None:
    for column in (pa.array([0.1, None, 3.0], pa.float32()), pa.chunked_array([[0.1], [None, 3.0]], pa.float32())):
        assert text_column(column) == text_column(np.array([0.1, np.nan, 3.0], np.float32)) == ["0.1", None, "3"]


def test_columns_of_a_frame_with_missing_cells_are_read_as_they_come(trained: Path) -> None:
    model = fusion.load(str(trained))
    frame = pd.DataFrame(
        {"text": ["red?", None, "blue?"], "number": pd.array([1, None, 2], dtype="Int64"), "single": np.float32([0.1, 2, np.nan])}
    )
    for name, texts in (("text", ["red?", "blue?"]), ("number", ["1", "2"]), ("single", ["0.1", "2"])):
        column = frame[name][frame[name].notna()]
        assert np.array_equal(model.predict(texts=column).probabilities, model.predict(texts=texts).probabilities), name


def test_columns_of_images_are_read_as_they_come(trained: Path, tmp_path: Path) -> None:
    model = fusion.load(str(trained))
    array = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a b.png")
    path = str(tmp_path / "a b.png")
    expected = model.predict(images=[array, array]).probabilities
    columns = [
        np.array([path, path]),
        pd.Series([path, path], index=[5, 3]),
        (Path(one) for one in (path, path)),
        [f"file://{path.replace(' ', '%20')}", f" {path} "],
        [bytearray((tmp_path / "a b.png").read_bytes()), array],
        np.stack([array, array]),
    ]
    for column in columns:
        assert np.array_equal(model.predict(images=column).probabilities, expected)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"texts": "red?"}, "texts is one str; expected a list"),
        ({"texts": np.array("red?")}, "texts is one ndarray"),
        ({"images": "a.png"}, "images is one str; expected a list"),
        ({"images": Path("a.png")}, "expected a list"),
        ({"images": Image.new("RGB", (8, 8))}, "expected a list"),
        ({"images": np.zeros((8, 8, 3), np.uint8)}, "expected a list"),
        ({"images": b"bytes"}, "images is one bytes"),
        ({"texts": pd.DataFrame({"text": ["red?"]})}, "one DataFrame of 2 dimensions"),
        ({"texts": {"a": "red?"}}, "texts is a dict"),
        ({"texts": 3}, "texts is a int"),
        ({"texts": ["red?", ["blue?"]]}, "sample 1: its text is a list"),
        ({"texts": ["red?", b"blue?"]}, "sample 1: its text is a bytes"),
        ({"images": [None, "https://example.org/a.png"], "texts": ["red?", "red?"]}, "sample 1: image missing: .*download it first"),
        ({"images": [None, "gone.png"], "texts": ["red?", "red?"]}, "sample 1: its image can't be read: missing .gone.png"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # a picture's repr has its address
)
def test_what_is_no_column_or_no_sample_is_refused_in_one_line(trained: Path, given: dict, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        fusion.load(str(trained)).predict(**given)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_alone_is_enough(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_CACHE", str(tmp_path / "nothing"))
    alone = tmp_path / "elsewhere.ckpt"
    alone.write_bytes((trained / "checkpoints" / "best.ckpt").read_bytes())
    texts = ["is there a red circle?"]
    assert fusion.load(str(alone)).predict(texts=texts).labels == fusion.load(str(trained)).predict(texts=texts).labels


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"fusion": {"format": 1}, "payload": Path}, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match="has more than tensors and plain data"):
        fusion.load(str(tmp_path / "bad.ckpt"))


def test_a_run_on_a_share_of_the_samples_is_scored_on_the_splits_that_it_had(here: Run, world: Path) -> None:
    done = here("fit", *TINY, "--data.train_samples=40", "--data.where={kind: existence}", "--runs=shares")
    assert done.returncode == 0, done.stderr
    run = next((world / "shares" / "quickstart").iterdir())
    for split, count in (("train", 40), ("val", int(re.findall(r"^  val +(\d+) samples", done.stdout, re.MULTILINE)[0]))):
        scored = here("evaluate", f"--run={run}", f"--split={split}", "--by=kind")
        assert re.search(rf"^existence .* {count}$", scored.stdout, re.MULTILINE), scored.stdout + scored.stderr
        assert "changed" not in scored.stdout + scored.stderr


def test_a_manifest_without_the_column_of_a_modality_is_predicted_as_without_it(here: Run, trained: Path, world: Path) -> None:
    """As a column of empty cells is; which is said. A table is not the model's if none of its inputs is there."""
    (world / "texts.csv").write_text("id,text,split\na,is there a red circle?,unheard-of\nb,is there a blue square?,\n")
    (world / "empty.csv").write_text("id,text,image\na,is there a red circle?,\nb,is there a blue square?,\n")
    told = {}
    for name in ("texts", "empty"):
        told[name] = here("predict", f"--run={trained}", f"--manifest={name}.csv", f"--out={name}-out.csv")
        assert told[name].returncode == 0, told[name].stderr
    assert "note: texts.csv has no column 'image': its samples are treated as having no image.\n" in told["texts"].stdout
    assert "has no column" not in told["empty"].stdout
    assert (world / "texts-out.csv").read_text() == (world / "empty-out.csv").read_text()
    (world / "neither.csv").write_text("id,words\na,is there a red circle?\n")
    refused = here("predict", f"--run={trained}", "--manifest=neither.csv")
    assert refused.returncode == 2
    assert "has no column 'image'" in refused.stderr
    assert "has no column 'text'" in refused.stderr
    assert "modalities" not in refused.stderr


def test_every_option_that_an_error_advises_is_one_of_the_command(trained: Path, here: Run, world: Path) -> None:
    (world / "foreign.csv").write_text("id;words;pic\na;is there a red circle?;\na;red?;\nb;caf\u00e9?;\n", encoding="cp1252")
    line = [f"--run={trained}", f"--manifest={world / 'foreign.csv'}", f"--out={world / 'foreign-out.csv'}"]
    for status, option in (2, "--data.columns.text=words"), (2, "--data.columns.id=null"), (0, "--data.format.encoding=cp1252"):
        done = here("predict", *line)
        assert done.returncode == status
        listed = (world / "foreign-out-data_issues.csv").read_text() if status == 0 else ""
        assert option.partition("=")[0] in done.stderr + listed
        line.append(option)
    assert here("predict", *line).returncode == 0
    with open(world / "foreign-out.csv") as file:
        assert [row["id"] for row in csv.DictReader(file)] == ["2", "3", "4"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--data.columns.txt=words"], "Did you mean data.columns.text"),
        (["--data.format.encoding=klingon"], "data.format.encoding is 'klingon'"),
        (["--batch_size=0"], "expected an integer of at least 1"),
        (["--out=folder.csv"], "--out folder.csv is a folder"),
    ],
)
def test_a_mistaken_option_of_reading_is_one_line(trained: Path, in_process: InProcess, world: Path, words: list[str], told: str) -> None:
    (world / "ask.csv").write_text("id,text\na,red?\n")
    (world / "folder.csv").mkdir(exist_ok=True)
    status, error = in_process("predict", [f"--run={trained}", "--manifest=ask.csv", *words])
    assert status == 2
    assert told in error


def test_evaluate_reads_the_runs_own_table_by_options_too(trained: Path, in_process: InProcess, world: Path) -> None:
    status, error = in_process("evaluate", [f"--run={trained}", "--data.columns.label=answer"])
    assert status == 2
    assert "has no column 'answer' for the labels" in error


def test_evaluate_takes_a_split_of_the_run_or_a_manifest(trained: Path, in_process: InProcess) -> None:
    status, error = in_process("evaluate", [f"--run={trained}", "--manifest=m.csv", "--split=test"])
    assert status == 2
    assert "not both" in error


def test_evaluate_groups_by_any_column_of_the_manifest_by_its_own_name(trained: Path, here: Run, world: Path) -> None:
    rows = "".join(f",is there a red circle?,{'yes' if i % 2 else 'no'},{i % 3}\n" for i in range(6))
    (world / "named.csv").write_text(f"image,question,answer,a/b: c\n{rows}")
    line = [f"--run={trained}", f"--manifest={world / 'named.csv'}", "--data.columns.text=question", "--data.columns.label=answer"]
    for by, groups in ("question", ["is there a red circle?"]), ("answer", ["no", "yes"]), ("a/b: c", ["0", "1", "2"]):
        done = here("evaluate", *line, f"--by={by}")
        assert done.returncode == 0, done.stderr
        assert all(f"\n{group} " in done.stdout for group in groups)
    recipe = yaml.safe_load((trained / "recipe.yaml").read_text())
    run = world / "run-by-slash"
    shutil.copytree(trained, run)
    recipe["data"] |= {"preparer": None, "manifest": str(world / "slash.csv"), "val": 0}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (run / "samples.parquet").unlink()
    rows = "".join(f",red {i}?,{'yes' if i % 2 else 'no'},test,{i}\n" for i in range(4))
    (world / "slash.csv").write_text(f"image,text,label,split,a/b: c\n{rows}")
    done = here("evaluate", f"--run={run}", "--by=a/b: c")
    assert done.returncode == 0, done.stderr
    assert (run / "evaluation-test-by-a_b_ c.json").is_file()


def test_what_predict_writes_overwrites_nothing_of_the_run_and_not_the_manifest(
    here: Run, trained: Path, in_process: InProcess, world: Path
) -> None:
    run = world / "own-files"
    shutil.copytree(trained, run)
    held = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert {"data_issues.csv", "metrics.csv", "samples.parquet"} <= held.keys()
    (world / "some-bad.csv").write_text("id,image,text\na,gone.png,red?\nb,,red?\n")
    done = here("predict", f"--run={run}", "--manifest=some-bad.csv", f"--out={run / 'new.csv'}")
    assert done.returncode == 0, done.stderr
    assert f"see {run / 'new-data_issues.csv'}" in done.stdout
    for name in ("data_issues.csv", "metrics.csv", "samples.parquet"):
        status, error = in_process("predict", [f"--run={run}", "--manifest=some-bad.csv", f"--out={run / name}"])
        assert status == 2
        assert f"would overwrite the run's own {name}" in error
    (world / "good.csv").write_text("id,image,text\nb,,red?\n")
    here("predict", f"--run={run}", "--manifest=good.csv", f"--out={run / 'new.csv'}")
    assert not (run / "new-data_issues.csv").exists()  # of the last time
    (world / "linked.csv").hardlink_to(world / "some-bad.csv")
    status, error = in_process("predict", [f"--run={run}", "--manifest=some-bad.csv", "--out=linked.csv"])
    assert status == 2
    status, error = in_process("predict", [f"--run={run}", "--manifest=some-bad.csv", "--out=./some-bad.csv"])
    assert status == 2
    assert "--out some-bad.csv would overwrite the manifest itself" in error
    manifest = world / "its-data_issues.csv"
    shutil.copy(world / "some-bad.csv", manifest)
    status, error = in_process("predict", [f"--run={run}", f"--manifest={manifest}", f"--out={world / 'its.csv'}"])
    assert status == 2
    assert f"would overwrite the manifest itself (its list of skipped samples: {manifest})" in error
    assert {name: (run / name).read_bytes() for name in held} == held
    trained_on = world / "trained-on.csv"
    trained_on.write_text("kept")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"]["val_manifest"] = str(trained_on)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    status, error = in_process("predict", [f"--run={run}", "--manifest=some-bad.csv", f"--out={trained_on}"])
    assert status == 2
    assert "would overwrite the run's own data.val_manifest" in error
    assert trained_on.read_text() == "kept"
