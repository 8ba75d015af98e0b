"""Starting from the weights of another run: what fits is taken, tokens and classes by name, and what doesn't is listed."""

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
from fusion.model import FusionModel, make_head
from fusion.runs.bundle import FORMAT, is_bundle, read_bundle
from fusion.runs.checkpoint_files import find_damage

MOST_NAMES = 5


def load_weights(model: FusionModel | None, file: str | Path, processor: Processor | None = None) -> str:
    """Take the weights of a file whose names and shapes fit (a run's checkpoint; a state_dict, .pt or .safetensors); gives what to print.

    A row that stands for a token or a class is taken for the same token or class of this model, whose tokenizer and classes `processor`
    tells, wherever it stood in the other. A file of nothing but weights names neither: rows are then taken in their order.

    Raises UserError for a file that is missing, corrupt, no set of weights, or fits nowhere.
    """
    assert model is not None
    given, about = weights_of(Path(file).expanduser())
    own = model.state_dict()
    told = about is not None and about.get("format") == FORMAT and "processor" in about  # of another version weights alone are taken
    before = Processor.from_state(about["processor"]) if told and about is not None else None
    rows = [] if before is None or processor is None else rows_that_moved(model, before, processor)
    fitting: dict[str, Tensor] = {}
    misshaped, inseparable, nameless = [], [], []
    for name in [name for name in own if name in given]:
        moved = next((r for r in rows if name in r.names), None)
        if moved is not None and name in moved.whole:
            inseparable.append(name)
        elif moved is not None and moved.same and given[name].shape[1:] == own[name].shape[1:]:
            there, here = torch.tensor(moved.same).T
            fitting[name] = own[name].clone().index_copy(0, here, given[name][there].to(own[name].dtype))
        elif moved is not None and not moved.same:
            nameless.append(name)
        elif moved is not None or given[name].shape != own[name].shape:
            misshaped.append(f"{name} {tuple(given[name].shape)} where {tuple(own[name].shape)} is expected")
        else:
            fitting[name] = given[name]
    if not fitting:
        raise UserError(
            f"--init_from={file}: none of its {len(given)} weights fits this model; it begins with {', '.join(list(given)[:3])}"
        )
    model.load_state_dict(fitting, strict=False)
    lines = [f"started from {file}: {len(fitting)} of {len(own)} weights", *(f"  {r}" for r in rows)]
    if before is None:
        lines.append("  the file names neither tokens nor classes: where their numbers agree, they are taken to be the same")
    missing = [name for name in own if name not in given]
    unexpected = [name for name in given if name not in own]
    listings = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": misshaped,
        "for all the other's classes": inseparable,
        "for tokens or classes of which none occurs here": nameless,
    }
    for what, names in listings.items():
        if names:
            more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
            lines.append(f"  {len(names)} {what}: {', '.join(names[:MOST_NAMES])}{more}")
    return "\n".join(lines)


@dataclass
class MovedRows:
    """Weights whose rows stand for tokens or classes, of which the two models have others, or the same in another order.

    what: "tokens" or "classes". names: the weights. whole: those of them that can't be taken apart by rows. same: (row there, row here) of
    what both have. new: what only this model has.
    """

    what: str
    names: set[str]
    whole: set[str]
    same: list[tuple[int, int]]
    new: list[str]

    def __str__(self) -> str:
        total = len(self.same) + len(self.new)
        new = f"; {len(self.new):,} begin anew: {listed(self.new)}" if self.new else ""
        return f"rows of {len(self.same):,} of {total:,} {self.what} are carried over by name{new}"


def rows_that_moved(model: FusionModel, before: Processor, now: Processor) -> list[MovedRows]:
    """What `before` has other than `now`: tokens of the text encoder's embeddings, classes of the head's outputs."""
    found = []
    for name, kind in now.inputs.items():
        other = before.inputs.get(name)
        if isinstance(kind, TableInput) and isinstance(other, TableInput) and kind.learnt() != other.learnt():
            of_columns = {parameter for parameter, _ in model.named_parameters() if parameter.startswith(f"encoders.{name}.tokens.")}
            found.append(MovedRows("columns and categories", of_columns, set(), [], kind.columns))
        if not (isinstance(kind, TextInput) and isinstance(other, TextInput)):
            continue
        there, here = (one.tokenizer.backend.get_vocab() for one in (other, kind))
        if there != here:
            weight = cast(TransformersText, model.encoders[name]).embedding.weight
            names = {parameter for parameter, p in model.named_parameters() if p is weight}
            found.append(moved_rows("tokens", names, set(), there, here))
    if before.task.names != now.task.names and len(before.task.names) > 1:
        rows, whole = weights_of_classes(model)
        there, here = ({name: i for i, name in enumerate(p.task.names)} for p in (before, now))
        found.append(moved_rows("classes", rows | whole, whole, there, here))
    return found


def moved_rows(what: str, names: set[str], whole: set[str], there: Mapping[str, int], here: Mapping[str, int]) -> MovedRows:
    same = [(there[name], row) for name, row in here.items() if name in there]
    return MovedRows(what, names, whole, same, sorted(name for name in here if name not in there))


def weights_of_classes(model: FusionModel) -> tuple[set[str], set[str]]:
    """The head's weights with a row for each class; and those whose shape depends on the number of classes in another way."""
    head = model.head
    with torch.device("meta"):
        more = make_head(dict(model.encoders.items()), partial(type(head), **head.init_args), head.out_dim + 1).state_dict()  # type: ignore[arg-type]
    rows: set[str] = set()
    whole: set[str] = set()
    for name, own in head.state_dict().items():
        if own.shape != more[name].shape:
            is_row = own.shape[0] == head.out_dim and own.shape[1:] == more[name].shape[1:]
            (rows if is_row else whole).add(f"head.{name}")
    return rows, whole


def weights_of(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The weights in a file, by the names that a FusionModel gives them; and what a run's checkpoint says of its model."""
    if is_bundle(path):
        found_about, found_weights = read_bundle(path)
        return found_weights, found_about
    if not path.is_file():
        raise UserError(f"--init_from={path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            held: Any = load_file(path)
        else:
            damage = find_damage(path)
            if damage:
                raise UserError(f"--init_from={path}: the file is corrupt: {damage}")
            held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"--init_from={path}: refused; it holds more than tensors and plain data, which could run any code") from error
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--init_from={path}: can't be read ({str(error).splitlines()[0]})") from error
    about = held.get("fusion") if isinstance(held, dict) else None
    if isinstance(held, dict) and "state_dict" in held:  # a checkpoint of Lightning, ours or another's
        held = {name.removeprefix("model."): value for name, value in held["state_dict"].items()}
    found = {name: value for name, value in held.items() if isinstance(value, Tensor)} if isinstance(held, dict) else {}
    if not found:
        raise UserError(f"--init_from={path}: it holds no weights; expected a checkpoint or a state_dict")
    return found, about
