"""Initialisation from the weights of another run: loads what fits, with tokens and classes matched by name, and lists what doesn't."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fusion.data.kinds import TableInput, TextInput
from fusion.data.processor import Processor
from fusion.data.table import listed
from fusion.encoders import TransformersText
from fusion.errors import UserError
from fusion.heads import PerTask
from fusion.model import FusionModel, make_head
from fusion.runs.bundle import FORMAT, is_bundle, read_bundle
from fusion.runs.checkpoint_files import find_corruption

MOST_NAMES = 5


def load_weights(model: FusionModel | None, file: str | Path, processor: Processor | None = None) -> str:
    """Load the weights of a file whose names and shapes match (a run's checkpoint; a state_dict, .pt or .safetensors); returns a report.

    Rows of tokens and classes are matched by name: `processor` has the tokenizer and the classes of this model, the checkpoint those of the
    other. A file of weights alone has no names of tokens or classes: its rows are then loaded in their order.

    Raises UserError for a file that is missing, corrupt, has no weights, or none that match.
    """
    assert model is not None
    given, about = weights_of(Path(file).expanduser())
    own = model.state_dict()
    # Of a checkpoint of another version only the weights are used.
    has_processor = about is not None and about.get("format") == FORMAT and "processor" in about
    before = Processor.from_state(about["processor"]) if has_processor and about is not None else None
    all_moved = [] if before is None or processor is None else rows_that_moved(model, before, processor)
    fitting: dict[str, Tensor] = {}
    misshaped, inseparable, unmatched = [], [], []
    for name in [name for name in own if name in given]:
        moved = next((m for m in all_moved if name in m.names), None)
        if moved is not None and name in moved.whole:
            inseparable.append(name)
        elif moved is not None and moved.same and given[name].shape[1:] == own[name].shape[1:]:
            there, here = torch.tensor(moved.same).T
            fitting[name] = own[name].clone().index_copy(0, here, given[name][there].to(own[name].dtype))
        elif moved is not None and not moved.same:
            unmatched.append(name)
        elif moved is not None or given[name].shape != own[name].shape:
            misshaped.append(f"{name} {tuple(given[name].shape)} where {tuple(own[name].shape)} is expected")
        else:
            fitting[name] = given[name]
    if not fitting:
        raise UserError(f"--init_from={file}: none of its {len(given)} weights fits this model; the first are {', '.join(list(given)[:3])}")
    model.load_state_dict(fitting, strict=False)
    lines = [f"initialised from {file}: {len(fitting)} of {len(own)} weights", *(f"  {m}" for m in all_moved)]
    if before is None:
        lines.append("  the file has no names of tokens or classes: where their numbers agree, they are assumed to be the same")
    missing = [name for name in own if name not in given]
    unexpected = [name for name in given if name not in own]
    listings = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": misshaped,
        "not separable by class": inseparable,
        "for tokens or classes that this model doesn't have": unmatched,
    }
    for what, names in listings.items():
        if names:
            more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
            lines.append(f"  {len(names)} {what}: {', '.join(names[:MOST_NAMES])}{more}")
    return "\n".join(lines)


@dataclass
class MovedRows:
    """Weights with a row for each token or class, where the two models have different ones, or the same ones in another order.

    what: "tokens" or "classes". names: the weights. whole: those of them that don't consist of a row for each class. same: (row there, row
    here) of the tokens or classes that both have. new: those that only this model has.
    """

    what: str
    names: set[str]
    whole: set[str]
    same: list[tuple[int, int]]
    new: list[str]

    def __str__(self) -> str:
        total = len(self.same) + len(self.new)
        new = f"; {len(self.new):,} newly initialised: {listed(self.new)}" if self.new else ""
        return f"rows of {len(self.same):,} of {total:,} {self.what} are loaded by name{new}"


def rows_that_moved(model: FusionModel, before: Processor, now: Processor) -> list[MovedRows]:
    """Where `before` and `now` differ: tokens of the text encoder's embeddings, classes of the head's outputs."""
    moved: list[MovedRows] = []
    for name, kind in now.inputs.items():
        other = before.inputs.get(name)
        if isinstance(kind, TableInput) and isinstance(other, TableInput) and kind.learnt() != other.learnt():
            of_columns = {parameter for parameter, _ in model.named_parameters() if parameter.startswith(f"encoders.{name}.tokens.")}
            moved.append(MovedRows("columns and categories", of_columns, set(), [], kind.columns))
        if not (isinstance(kind, TextInput) and isinstance(other, TextInput)):
            continue
        there, here = (one.tokenizer.backend.get_vocab() for one in (other, kind))
        if there != here:
            weight = cast(TransformersText, model.encoders[name]).embedding.weight
            names = {parameter for parameter, p in model.named_parameters() if p is weight}
            moved.append(moved_rows("tokens", names, set(), there, here))
    if before.task.names != now.task.names and len(before.task.names) > 1:
        rows, whole = weights_of_classes(model)
        there, here = ({name: i for i, name in enumerate(p.task.names)} for p in (before, now))
        moved.append(moved_rows("classes", rows | whole, whole, there, here))
    return moved


def moved_rows(what: str, names: set[str], whole: set[str], there: Mapping[str, int], here: Mapping[str, int]) -> MovedRows:
    same = [(there[name], row) for name, row in here.items() if name in there]
    return MovedRows(what, names, whole, same, sorted(name for name in here if name not in there))


def weights_of_classes(model: FusionModel) -> tuple[set[str], set[str]]:
    """Names of the head's weights with a row for each class; and of those whose shape depends on the number of classes in another way."""
    head = model.head
    if isinstance(head, PerTask):  # whose outputs are divided among tasks
        of_outputs = {id(p) for layer in head.output_layers() for p in layer.parameters()}
        return set(), {f"head.{name}" for name, p in head.named_parameters() if id(p) in of_outputs}
    # Both built anew: the model's own may have been pruned.
    with torch.device("meta"):
        same, wider = (
            make_head(dict(model.encoders.items()), partial(type(head), **head.init_args), outputs).state_dict()  # type: ignore[arg-type]
            for outputs in (head.out_dim, head.out_dim + 1)
        )
    rows: set[str] = set()
    whole: set[str] = set()
    for name, own in same.items():
        if own.shape != wider[name].shape:
            has_rows = own.shape[0] == head.out_dim and own.shape[1:] == wider[name].shape[1:]
            (rows if has_rows else whole).add(f"head.{name}")
    return rows, whole


def weights_of(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The weights in a file, by their names in a FusionModel; and a run's description of its model, None if the file has none."""
    if is_bundle(path):
        bundle_about, bundle_weights = read_bundle(path)
        return bundle_weights, bundle_about
    if not path.is_file():
        raise UserError(f"--init_from={path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            corruption = find_corruption(path)
            if corruption:
                raise UserError(f"--init_from={path}: the file is corrupt: {corruption}")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"--init_from={path}: rejected; it has more than tensors and plain data, which could run any code") from error
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--init_from={path}: can't be read ({str(error).splitlines()[0]})") from error
    about = content.get("fusion") if isinstance(content, dict) else None
    if isinstance(content, dict) and "state_dict" in content:  # a Lightning checkpoint, of fusion or not
        content = {name.removeprefix("model."): value for name, value in content["state_dict"].items()}
    weights = {name: value for name, value in content.items() if isinstance(value, Tensor)} if isinstance(content, dict) else {}
    if not weights:
        raise UserError(f"--init_from={path}: it has no weights; expected a checkpoint or a state_dict")
    return weights, about
