"""Samples for the benchmark of serving: requests with the answers they must get, and batches for the model alone."""

import base64
import io
import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from fusion.deploy.serve.limits import Limits
from fusion.deploy.serve.model import load
from fusion.deploy.serve.requests import checked_values
from fusion.deploy.serve.versions import Version
from fusion.errors import UserError

DISTINCT = 512  # requests, sent in turns
WORDS = ("is", "there", "a", "red", "green", "blue", "circle", "square", "above", "below", "the", "what", "colour", "shape", "next", "to")


class Requests(NamedTuple):
    """Which model is asked, in which batches, with pictures of which width and height (None: of the model's own)."""

    path: Path
    batch_size: int
    pixels: int | None


def version_of(path: Path, threads: int) -> Version:
    version = Version(load(path, threads=threads, max_megapixels=100.0), path)
    if not {"image", "text"} & {one.form for one in version.inputs.values()}:
        raise UserError(f"{path} reads neither images nor texts; expected a model that reads either")
    return version


def bodies(version: Version, count: int, pixels: int | None) -> list[dict[str, Any]]:
    """Distinct samples as JSON: pictures and texts; other inputs are missing."""
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        body: dict[str, Any] = {}
        for name, one in version.inputs.items():
            if one.form == "image":
                body[name] = base64.b64encode(a_picture(rng, pixels or max(one.spec.size))).decode()  # type: ignore[attr-defined]
            elif one.form == "text":
                body[name] = " ".join(rng.choice(WORDS, rng.integers(4, 12)))
        found.append(body)
    return found


def a_picture(rng: np.random.Generator, pixels: int) -> bytes:
    """A JPEG file with coarse and fine structure, as photographs have."""
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((pixels, pixels), Image.Resampling.BICUBIC)
    noise = rng.normal(0, 6, (pixels, pixels, 1))
    file = io.BytesIO()
    Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def write_requests(wanted: Requests, files: Mapping[str, str]) -> str:
    """Writes distinct requests, with the answers that each server must give, to its file; returns what they are."""
    version = version_of(wanted.path, 1)
    samples = bodies(version, DISTINCT, wanted.pixels)
    rows = [version.row(checked_values(body, version.inputs, Limits())) for body in samples]
    batches = [rows[start : start + wanted.batch_size] for start in range(0, len(rows), wanted.batch_size)]
    answers = ["" if one is None else one.answer for batch in batches for one in version.answers(batch)]
    head = "POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{}"
    contents = [json.dumps(body) for body in samples]
    requests = [head.format(len(content), content) for content in contents]
    for server, file in files.items():
        between = ":" if server == "LitServe" else ": "  # how each writes JSON
        expected = [f'"answer"{between}{json.dumps(answer)}' if isinstance(answer, str) else "" for answer in answers]
        Path(file).write_text(json.dumps({"requests": requests, "expected": expected}))
    has_pictures = any(one.form == "image" for one in version.inputs.values())
    size = "" if not has_pictures else f", with JPEG pictures, of {sum(map(len, contents)) / DISTINCT / 1000:.1f} kB each"
    return f"{DISTINCT} distinct requests{size}"


class ModelRate(NamedTuple):
    """Samples per second of a model without a server, and CPU time of one in ms."""

    per_second: float
    cpu_ms: float


def model_rate(wanted: Requests, runs: int, threads: int, seconds: float) -> ModelRate:
    """The rate of the model in batches that are in memory, `runs` of them at once."""
    version = version_of(wanted.path, threads)
    samples = bodies(version, wanted.batch_size, wanted.pixels)
    rows = [version.row(checked_values(body, version.inputs, Limits())) for body in samples]
    inputs = {name: one.concat([row.inputs[name] for row in rows]) for name, one in version.inputs.items()}
    version.model.run(inputs)
    counts, began, cpu = [0] * runs, time.perf_counter(), time.process_time()

    def work(i: int) -> None:
        while time.perf_counter() < began + seconds:
            version.model.run(inputs)
            counts[i] += 1

    workers = [threading.Thread(target=work, args=[i]) for i in range(runs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    samples_run = sum(counts) * wanted.batch_size
    return ModelRate(samples_run / (time.perf_counter() - began), 1000 * (time.process_time() - cpu) / samples_run)
