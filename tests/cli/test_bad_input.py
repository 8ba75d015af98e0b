"""Manifests and images that are wrong: one clear error, or a line in data_issues.csv; never a traceback, never a silent loss."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_runs import InProcess, Run

from fusion.data import Columns, Format
from fusion.settings.parser import FusionCLI
from fusion.settings.reading import data_of

OWN = [
    "--recipe=own",
    "--model.image.init_args.image_size=32",
    "--data.batch_size=4",
    "--trainer.max_epochs=1",
    "--trainer.accelerator=cpu",
    "--data.val=0.2",
    "--data.test=0.2",
]


def make_manifest(folder: Path, rows: int = 30, **changes: list[str]) -> Path:
    """A manifest of `rows` samples of two classes with a picture each; `changes` replaces whole columns."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(rows):
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
    columns: dict[str, list[str]] = {
        "id": [f"s{i}" for i in range(rows)],
        "image": [f"images/{i}.png" for i in range(rows)],
        "text": [f"sample number {i}" for i in range(rows)],
        "label": ["cat" if i % 2 else "dog" for i in range(rows)],
    }
    columns |= changes
    with open(folder / "m.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return folder / "m.csv"


def refused(in_process: InProcess, manifest: Path, *options: str) -> str:
    status, told = in_process("fit", [*OWN, f"--data.manifest={manifest}", *options])
    assert status == 2, told
    assert "Traceback" not in told
    return told


def test_a_missing_manifest_names_the_nearest_file(in_process: InProcess, tmp_path: Path) -> None:
    make_manifest(tmp_path)
    assert "m.csv" in refused(in_process, tmp_path / "n.csv")


def test_an_empty_manifest_is_refused(in_process, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("image,text,label\n")
    assert "no rows" in refused(in_process, tmp_path / "m.csv")


def test_a_missing_column_is_named_with_the_option_that_renames_it(in_process: InProcess, tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path)
    manifest.write_text(manifest.read_text().replace("id,image,text,label", "id,image,text,lable"))
    told = refused(in_process, manifest)
    assert "lable" in told
    assert "--data.columns.label" in told


def test_one_class_alone_is_refused(in_process, tmp_path: Path) -> None:
    assert "at least two classes" in refused(in_process, make_manifest(tmp_path, label=["cat"] * 30))


def test_ids_that_occur_twice_are_refused(in_process, tmp_path: Path) -> None:
    assert "'same'" in refused(in_process, make_manifest(tmp_path, id=["same", "same", *(f"s{i}" for i in range(28))]))


def test_a_group_in_two_splits_is_refused_until_accepted(in_process: InProcess, tmp_path: Path) -> None:
    splits = ["train"] * 20 + ["val"] * 5 + ["test"] * 5
    told = refused(in_process, make_manifest(tmp_path, split=splits, group=["one", *(f"g{i}" for i in range(28)), "one"]))
    assert "'one'" in told
    assert "--data.on_shared_group=report" in told
    assert "--data.columns.group=null" in told


def test_the_format_and_the_columns_left_out_are_options_kept_in_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("image,text,label\n")
    options = [
        "--data.columns.id=null",
        "--data.format.quotes=true",
        '--data.format.missing=["nan","N/A"]',
        "--data.format.encoding=cp1252",
    ]
    expected = Format(encoding="cp1252", separator="|", quotes=True, missing=("nan", "N/A"))
    data = FusionCLI([*OWN, f"--data.manifest={tmp_path / 'm.csv'}", *options, "--data.format.separator=|"])
    assert data.model_and_data()[1].format == expected
    (tmp_path / "recipe.yaml").write_text(data.resolved())
    assert data_of(tmp_path).format == expected
    assert data_of(tmp_path).columns == Columns(id=None)


def test_a_label_that_train_lacks_is_listed(in_process: InProcess, tmp_path: Path) -> None:
    labels = ["cat" if i % 2 else "dog" for i in range(29)] + ["bird"]
    told = refused(in_process, make_manifest(tmp_path, label=labels, split=["train"] * 20 + ["val"] * 5 + ["test"] * 5))
    assert "'bird' (test)" in told
    assert "count_as_wrong" in told


@pytest.fixture(scope="module")
def corrupt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest in which six samples are bad, each in its own way, and two lack one modality."""
    folder = tmp_path_factory.mktemp("corrupt")
    texts, labels, images = (
        [f"sample {i}" for i in range(30)],
        ["cat" if i % 2 else "dog" for i in range(30)],
        [f"images/{i}.png" for i in range(30)],
    )
    images[0], images[1], images[2], images[3] = "images/zero.png", "images/cut.jpg", "images/words.png", "images/huge.png"
    labels[4] = ""
    images[5], texts[5] = "", ""
    images[6] = ""
    texts[7] = ""
    manifest = make_manifest(folder, text=texts, label=labels, image=images)
    (folder / "images/zero.png").touch()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)).save(folder / "images/whole.jpg")
    whole = (folder / "images/whole.jpg").read_bytes()
    (folder / "images/cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "images/words.png").write_text("not a picture at all")
    Image.new("1", (20_000, 20_000)).save(folder / "images/huge.png")
    # One more row whose text is not UTF-8.
    manifest.write_bytes(manifest.read_bytes() + b"s30,images/9.png,caf\xe9,cat\n")
    return manifest


def test_bad_samples_are_dropped_with_file_row_and_reason_and_training_goes_on(here: Run, corrupt: Path, world: Path) -> None:
    done = here("fit", *OWN, f"--data.manifest={corrupt}", "--runs=corrupt-runs")
    assert done.returncode == 0, done.stderr
    assert "7 samples dropped" in done.stdout
    assert "without image" in done.stdout
    (run,) = (world / "corrupt-runs" / "own").iterdir()
    with open(run / "data_issues.csv") as file:
        issues = {row["id"]: row for row in csv.DictReader(file)}
    told = {name: issues[name]["reason"] for name in ("s0", "s1", "s2", "s3", "s4", "s5")}
    assert "empty" in told["s0"]
    assert "truncated" in told["s1"]
    assert "not an image" in told["s2"]
    assert "400.0 megapixels" in told["s3"]
    assert "label" in told["s4"]
    assert "no image and no text" in told["s5"]
    assert any("UTF-8" in row["reason"] and row["row"] == "32" for row in issues.values())
    assert issues["s0"]["row"] == "2"
    assert issues["s0"]["file"].endswith("m.csv")


def test_the_first_bad_sample_can_be_an_error(in_process: InProcess, corrupt: Path) -> None:
    assert "m.csv" in refused(in_process, corrupt, "--data.on_bad_sample=error")
