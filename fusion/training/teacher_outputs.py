"""The outputs and features of a trained model for every training sample, computed once and cached by content."""

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusion.console import Heartbeat, print_rank_zero
from fusion.data.kinds import Kind
from fusion.data.module import Split
from fusion.data.table import Table
from fusion.encoders import Images
from fusion.errors import UserError
from fusion.predictor import Predictor, on_device
from fusion.runs.bundle import ABOUT, FORMAT, WEIGHTS

BATCH = 64  # always the same, so that outputs computed again are equal to the bit
OUTPUTS = "outputs"


def digest_of_model(path: Path) -> str:
    """Digest of a model's folder or of a checkpoint file."""
    digest = blake2b(digest_size=16)
    for file in [path / ABOUT, path / WEIGHTS] if path.is_dir() else [path]:
        with open(file, "rb") as opened:
            while block := opened.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def teacher_outputs(predictor: Predictor, model_digest: str, split: Split, features: Sequence[str], cache: Path) -> dict[str, Tensor]:
    """For each sample of a split, under "outputs" (n, K) what the teacher's task passes on (Task.teacher_outputs), and for each name in
    `features` these (n, D), with a row of NaN where the sample lacks that input.

    They are computed from the table's cells by the teacher's own processing, once for this model and these samples: a file in `cache`
    keeps them, and of several processes one computes them. Raises UserError for inputs that the teacher can't read, and for outputs that
    are not finite.
    """
    names = predictor.modalities
    key = blake2b(repr((FORMAT, model_digest, sorted(features), names)).encode(), digest_size=16)
    for name in names:
        kind = split.table.kinds[name]
        for cell in split.table.inputs[name]:
            # By repr, since a text may be "None", or have several lines.
            key.update(f"{kind.digest(cell) or kind.local(cell, '')!r}\n".encode(errors="surrogatepass"))
    path = cache / f"teacher-{key.hexdigest()}.safetensors"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if path.is_file():
                try:
                    return load_file(path)
                except SafetensorError:  # incomplete, after a full disk
                    path.unlink()
            found = compute(predictor, split, features)
            temporary = path.with_suffix(".tmp")
            save_file(found, temporary)
            temporary.replace(path)
            return found
    except (OSError, SafetensorError) as error:
        raise UserError(f"can't store the teacher's outputs in {cache} ({error}). Choose another folder: --data.cache=FOLDER") from error


@torch.inference_mode()
def compute(predictor: Predictor, split: Split, features: Sequence[str]) -> dict[str, Tensor]:
    """The same without the cache."""
    model, task, table = predictor.model, predictor.processor.task, split.table
    model.report_features(features)
    order = np.argsort(split.samples.blocks(), kind="stable")  # samples with the same image are adjacent, and share its encoding
    parts: dict[str, list[Tensor]] = {}
    sign = Heartbeat()
    for start in range(0, len(order), BATCH):
        if sign.due():
            print_rank_zero(f"teacher: {start:,} of {len(order):,} training samples")
        rows = order[start : start + BATCH].tolist()
        inputs = {name: on_device(read(kind, table, name, rows), predictor.device) for name, kind in predictor.processor.inputs.items()}
        output = model(inputs)
        found = {OUTPUTS: task.teacher_outputs(output.output)}
        for name in features:
            assert output.features is not None
            present = inputs[name].present if name in inputs else torch.ones(len(rows), dtype=torch.bool, device=predictor.device)
            found[name] = torch.where(present[:, None], output.features[name].float(), torch.nan)
            reject_not_finite(found[name][present], table, np.array(rows)[present.cpu().numpy()], f"features '{name}'")
        reject_not_finite(found[OUTPUTS], table, rows, "outputs")
        for name, rows_of in found.items():
            parts.setdefault(name, []).append(rows_of.cpu())
    place = torch.from_numpy(np.argsort(order))
    return {name: torch.cat(chunks)[place].contiguous() for name, chunks in parts.items()}


def read(kind: Kind, table: Table, name: str, rows: Sequence[int]) -> Any:
    """The teacher's input for the cells of these rows, with each distinct image only once. Raises UserError for one that can't be read."""
    cells = [table.inputs[name][i] for i in rows]
    share = kind.takes is Images and not any(isinstance(cell, tuple) for cell in cells)
    distinct = list(dict.fromkeys(cells)) if share else cells
    unreadable: dict[int, UserError] = {}
    made = kind.batch(distinct, unreadable)
    for position, error in unreadable.items():
        i = rows[cells.index(distinct[position])]
        raise UserError(f"model.teacher: it can't read the {name} of {table.files[i]}, row {table.rows[i]}: {error}")
    if not share:
        return made
    places = {cell: place for place, cell in enumerate(distinct)}
    index = torch.tensor([places[cell] for cell in cells])
    return made._replace(present=made.present[index], image_index=index, image_mask=None)


def reject_not_finite(values: Tensor, table: Table, rows: Sequence[int] | np.ndarray, what: str) -> None:
    """Raises UserError for a row of the values (B, ...) that is not finite."""
    bad = (~values.isfinite().all(dim=1)).nonzero()
    if len(bad):
        i = int(rows[int(bad[0])])
        raise UserError(f"model.teacher: its {what} are not finite for {table.files[i]}, row {table.rows[i]}; choose another teacher")
