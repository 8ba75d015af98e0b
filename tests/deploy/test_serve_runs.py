"""Runs and packages behind the server answer as they do offline."""

import asyncio
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from serving import asked, encoded, picture, png
from untrained import learnt, texts, write_model

import fusion
from fusion.data.kinds import TextInput
from fusion.deploy.exporting import export
from fusion.deploy.serve.canary import RollbackLimits
from fusion.deploy.serve.limits import Limits
from fusion.deploy.serve.model import concurrency, load, of_kind
from fusion.deploy.serve.service import Service
from fusion.deploy.serve.versions import Version, Versions
from fusion.errors import UserError
from fusion.tasks import MultiLabel, Regression

ROUNDING = 1e-5  # of float32, in batches of another size


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model's folder that reads image, text and a table."""
    return write_model(tmp_path_factory.mktemp("runs") / "model", table=True)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A package for ONNX Runtime that reads image and text, and the run that it was exported from."""
    folder = tmp_path_factory.mktemp("packages")
    made = write_model(folder / "run" / "model")
    export(made, "onnx", folder / "package")
    return folder / "package", made


def service_of_path(path, limits=None, rollback=None, **options):
    versions = Versions(Version(load(path, threads=1, max_megapixels=25.0), path), rollback or RollbackLimits())
    return Service(versions, limits or Limits(), **{"batch_size": 8, "wait_ms": 20.0, "runs": 2, "threads": 2} | options)


def in_format(seed, kind):
    """A picture as a file."""
    image, file = Image.fromarray(picture(seed, 8)).resize((40 + seed % 7, 30)), io.BytesIO()
    (image.convert("RGBA") if kind == "PNG" and seed % 2 else image).save(file, kind)
    return file.getvalue()


def samples(count):
    """Of every pattern of missing inputs, with files of several formats, by input."""
    rng = np.random.default_rng(1)
    present = rng.random((count, 3)) < 0.8
    present[~present.any(1), 0] = True
    images = [in_format(i, ("PNG", "JPEG", "WEBP", "GIF", "BMP")[i % 5]) if present[i, 0] else None for i in range(count)]
    written = [text if present[i, 1] else None for i, text in enumerate(texts(2, count))]
    facts = [{"price": i % 23, "brand": "abc"[i % 3]} if present[i, 2] else None for i in range(count)]
    return images, written, facts


def bodies(images, written, facts):
    for image, text, row in zip(images, written, facts, strict=True):
        given = {"image": image and encoded(image), "text": text, "facts": row}
        yield {name: value for name, value in given.items() if value is not None}


def test_a_run_answers_over_http_as_offline_whatever_is_missing(run):
    images, written, facts = samples(60)
    table = {column: [row and row[column] for row in facts] for column in ("price", "brand")}
    expected = fusion.load(run).predict(images=images, texts=written, facts=table)

    async def ask(client):
        return await asyncio.gather(*(client.post("/predict", json=body) for body in bodies(images, written, facts)))

    answers = [answer.json() for answer in asked(service_of_path(run), ask)]
    assert [answer["answer"] for answer in answers] == expected.answers
    assert len(set(expected.answers)) > 1
    found = np.array([[answer["probabilities"][name] for name in expected.names] for answer in answers])
    assert np.abs(found - expected.values).max() < ROUNDING
    for name, mask in expected.present.items():
        assert [answer["present"][name] for answer in answers] == mask.tolist()


@pytest.mark.slow
def test_a_package_answers_over_http_as_it_does_offline_and_as_its_run(package):
    folder, made = package
    images, written, _ = samples(40)
    images[0] = images[0] or in_format(0, "PNG")
    kept = [i for i in range(40) if images[i] is not None or written[i] is not None]
    images, written = [images[i] for i in kept], [written[i] for i in kept]

    async def ask(client):
        return await asyncio.gather(*(client.post("/predict", json=body) for body in bodies(images, written, [None] * len(kept))))

    answers = [answer.json() for answer in asked(service_of_path(folder), ask)]
    for path in (folder, made):
        expected = fusion.load(path).predict(images=images, texts=written)
        found = np.array([[answer["probabilities"][name] for name in expected.names] for answer in answers])
        assert np.abs(found - expected.values).max() < ROUNDING


@pytest.mark.slow
def test_a_package_is_served_without_torch(package):
    code = (
        "import sys\n"
        "from fusion.cli.serve import parser_of\n"
        "from fusion.deploy.serve import app, server\n"
        "from fusion.deploy.serve.control import ready\n"
        "from fusion.deploy.serve.model import load\n"
        "from functools import partial\n"
        "parser_of()\n"
        "version = ready(sys.argv[1], partial(load, threads=1, max_megapixels=1.0), 4)\n"
        "assert version.answers([version.row({'text': 'is there a red circle'})])[0].answer\n"
        "print([name for name in ('torch', 'pyarrow', 'lightning', 'timm', 'jsonargparse', 'pandas') if name in sys.modules])\n"
    )
    root = Path(__file__).parents[2]
    words = [sys.executable, "-c", code, str(package[0])]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(root)}, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_several_images_are_rejected_where_the_run_had_one_each(run):
    body = {"image": [encoded(png(picture(0)))] * 2}
    answer = asked(service_of_path(run), lambda client: client.post("/predict", json=body))
    assert (answer.status_code, answer.json()["error"]) == (422, "image has 2 images, expected at most 1")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"facts": {"price": "cheap", "brand": "a"}}, "facts: column price has 'cheap', expected a number"),
        ({"facts": {"price": "nan"}}, "facts: column price has 'nan', expected a number"),
        ({"text": "\ud800"}, "text: "),
        ({"image": encoded(b"GIF89a")}, "its image can't be read: "),
        ({"image": encoded(b"/etc/passwd")}, "its image can't be read: not an image"),
    ],
)
def test_values_that_the_model_cannot_read_are_422(run, body, message):
    send = {"content": json.dumps(body), "headers": {"content-type": "application/json"}}
    answer = asked(service_of_path(run), lambda client: client.post("/predict", **send))
    assert (answer.status_code, answer.json()["error"][: len(message)]) == (422, message), answer.text


@pytest.mark.parametrize("task", ["regression", "labels"])
def test_other_tasks_have_their_own_answers(task, tmp_path):
    made = learnt(Regression(), ("1.5", "4", "9.25")) if task == "regression" else learnt(MultiLabel(), ("a;b", "b", "c", ""))
    path = write_model(tmp_path / task / "model", task=made)
    written = texts(3, 8)
    expected = fusion.load(path).predict(texts=written)

    async def ask(client):
        return await asyncio.gather(*(client.post("/predict", json={"text": text}) for text in written))

    answers = [answer.json() for answer in asked(service_of_path(path), ask)]
    if task == "labels":
        assert [answer["answer"] for answer in answers] == expected.answers
        assert list(answers[0]["probabilities"]) == expected.names
    else:
        assert np.allclose([answer["answer"] for answer in answers], expected.answers, rtol=1e-4)
        assert all(answer["answer"] in answer["values"].values() for answer in answers)


class Lengths(TextInput):
    """A kind of one's own, which makes batches and no arrays without torch."""

    def preprocessor(self):
        raise UserError("Lengths has no preprocessor()")

    def raw(self, values, name):
        return [len(value) for value in values]

    def batch(self, cells, unreadable):
        unreadable |= {i: UserError("too long") for i, cell in enumerate(cells) if cell > 9}
        return torch.tensor(cells)


def test_a_kind_of_input_of_ones_own_is_served_by_its_batches():
    reader, _ = of_kind(Lengths())
    unreadable = {}
    parts = [reader.batch(reader.raw([text], "text"), unreadable) for text in ("a red", "the")]
    assert (unreadable, reader.form, reader.concat(parts).tolist()) == ({}, "value", [5, 3])
    reader.batch(reader.raw(["a red circle"], "text"), unreadable)
    assert str(unreadable[0]) == "too long"


def test_the_version_changes_with_the_weights_and_not_with_the_place(run, tmp_path):
    moved = shutil.copytree(run, tmp_path / "moved" / "model")
    other = write_model(tmp_path / "other" / "model", table=True, seed=1)
    versions = [load(path, threads=1, max_megapixels=1.0).version for path in (run, moved, other)]
    names, digests = zip(*(version.rsplit("-", 1) for version in versions), strict=True)
    assert names[1:] == ("moved", "other")
    assert digests[0] == digests[1] != digests[2]


def test_a_run_on_a_hub_is_served_without_importing_what_it_names(run, tmp_path, monkeypatch):
    folder = shutil.copytree(run, tmp_path / "snapshot")
    monkeypatch.setattr("fusion.deploy.hub.model_folder", lambda name: folder if name == "hf://ada/shoes@v1" else pytest.fail(name))
    loaded = load("hf://ada/shoes@v1", threads=1, max_megapixels=1.0)
    assert loaded.version == f"ada/shoes-{load(run, threads=1, max_megapixels=1.0).version.rsplit('-', 1)[1]}"
    about = json.loads((folder / "model.json").read_text())
    about["processor"]["task"]["class"] = "antigravity.Task"
    (folder / "model.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="antigravity"):
        load("hf://ada/shoes@v1", threads=1, max_megapixels=1.0)
    assert "antigravity" not in sys.modules


def test_what_is_no_model_is_rejected(tmp_path):
    with pytest.raises(UserError, match="there is no run or package"):
        load(tmp_path / "nowhere", threads=1, max_megapixels=1.0)
    with pytest.raises(UserError, match="has no checkpoint 'best'"):
        load(tmp_path, threads=1, max_megapixels=1.0)


def test_batches_run_side_by_side_on_a_cpu_and_one_at_once_on_a_gpu():
    cores = len(os.sched_getaffinity(0))
    assert concurrency()[:2] == (min(cores, 4), max(cores // min(cores, 4), 1))
    assert concurrency(gpu=True)[:2] == (1, cores)
    assert concurrency(3, 5, 7) == (3, 5, 7)
