"""The examples of CONTRIBUTING and README do what they say: a head, a task, a kind of input and a recipe of one's own, in files alone."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
SMALL = [
    "--trainer.max_epochs=2",
    "--model.image.image_size=32",
    "--data.batch_size=16",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
]


def blocks(document, language):
    """The code of a document by the name in its first line."""
    found = re.findall(rf"```{language}\n# (\S+\.(?:py|yaml))\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL)
    return {name: f"# {name}\n{code}" for name, code in found}


def run(folder, *words):
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", "FUSION_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "fusion", *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture
def project(tmp_path):
    """A folder with the examples' files, and nothing of the repository changed."""
    for name, code in {**blocks("CONTRIBUTING.md", "python"), **blocks("CONTRIBUTING.md", "yaml"), **blocks("README.md", "yaml")}.items():
        (tmp_path / name).write_text(code)
    rng = np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


@pytest.mark.slow
def test_a_head_a_task_and_a_kind_of_input_are_a_file_each(project):
    with open(project / "bicycles.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "location", "how_many"])
        for i in range(80):
            writer.writerow([f"{i % 10}.png" if i % 6 else "", f"{i % 50},{3 * i % 90}" if i % 7 else "", "many" if i == 3 else i % 5])
        writer.writerow(["1.png", "somewhere", "2"])
    told = run(project, "fit", "--recipe", "places.yaml", "--data.manifest=bicycles.csv", *SMALL)
    assert "Largest" in told
    assert "val mae" in told
    (folder,) = (project / "runs/places").iterdir()
    with open(folder / "data_issues.csv", newline="") as file:
        reasons = [row["reason"] for row in csv.DictReader(file)]
    assert sorted(reasons)[2:] == ["no image and no place"] * 2  # samples 0 and 42
    assert sorted(reasons)[:2] == ["column location has 'somewhere', expected latitude,longitude in degrees", "label 'many' is not a count"]
    assert "mae" in run(project, "evaluate", "--run", str(folder)).lower()
    run(project, "predict", "--run", str(folder), "--manifest", "bicycles.csv", "--out", "p.csv")
    with open(project / "p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 78
    assert all(float(row["prediction"]) > 0 for row in rows)
    assert {row["present_place"] for row in rows} == {"true", "false"}


def test_the_head_of_the_example_keeps_the_contract_of_heads(project, monkeypatch):
    monkeypatch.syspath_prepend(str(project))
    from largest_head import Largest

    from fusion.features import Features

    torch.manual_seed(0)
    head = Largest({"text": 8, "image": 6}, 3)
    tokens, mask = torch.randn(4, 5, 8), torch.ones(4, 5, dtype=torch.bool)
    mask[1] = False
    noisy = torch.where(mask[..., None], tokens, torch.nan)
    pooled = torch.where(mask.any(1)[:, None], tokens.mean(1), torch.nan)
    found = head({"text": Features(noisy, mask, pooled), "image": torch.randn(4, 6)}).output
    assert found.isfinite().all()


@pytest.mark.slow
def test_the_readmes_listing_of_pictures_title_and_facts_trains(project):
    frame = pandas.DataFrame(
        {
            "pictures": [[f"{i % 10}.png", f"{(i + 1) % 10}.png"][: 1 + i % 2] if i % 5 else None for i in range(60)],
            "title": [f"a {['red', 'blue'][i % 2]} chair number {i}" for i in range(60)],
            "price": [10.5 * i if i % 4 else None for i in range(60)],
            "brand": [["alba", "brio", "coco"][i % 3] for i in range(60)],
            "listed_on": pandas.date_range("2024-01-01", periods=60),
            "label": ["chair", "table"] * 30,
        }
    )
    frame.to_parquet(project / "listings.parquet")
    told = run(project, "fit", "--recipe", "listings.yaml", "--trainer.max_epochs=1", "--data.batch_size=16", "--trainer.accelerator=cpu")
    assert "without photos" in told
    assert "facts  TableColumns" in told
