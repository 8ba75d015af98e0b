"""Heads saved alone, in a folder or on a hub: config.json (class, widths, arguments) and model.safetensors."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fusion.errors import UserError, construction, first_line
from fusion.heads.base import FusionHead
from fusion.heads.by_name import head_named
from fusion.hub_files import SCHEME, HubModel, download, upload
from fusion.rebuilding import importing_only

FORMAT = 1  # version of config.json
CONFIG, WEIGHTS = "config.json", "model.safetensors"
KEYS = ("class", "dims", "out_dim", "init_args")

Head = TypeVar("Head", bound=FusionHead)


def save(head: FusionHead, folder: str | os.PathLike[str]) -> None:
    """See FusionHead.save_pretrained."""
    save_file, _, failed = safetensors()
    target, config = Path(folder).expanduser(), config_of(head)
    # Cloned, since safetensors rejects tensors that share memory.
    weights = {name: x.detach().cpu().clone().contiguous() for name, x in head.state_dict().items()}
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".") as temporary:
            save_file(weights, Path(temporary, WEIGHTS), metadata={"format": "pt"})
            Path(temporary, CONFIG).write_text(config, encoding="utf-8")
            shutil.copymode(Path(temporary, CONFIG), Path(temporary, WEIGHTS))  # which safetensors lets its owner alone read
            for name in (WEIGHTS, CONFIG):
                os.replace(Path(temporary, name), target / name)
    except (OSError, failed) as error:
        raise UserError(f"can't save the head to {target} ({first_line(error)})") from error


def load(cls: type[Head], source: str | os.PathLike[str], trusted: Sequence[str]) -> Head:
    """See FusionHead.from_pretrained."""
    folder = located(source)
    config = read_config(folder, source)
    with importing_only(trusted):
        # Also covers the heads that a head names in its arguments.
        found = class_named(config["class"], source)
        if not issubclass(found, cls):
            name = found.__name__
            raise UserError(f"{source} is a {name}, not a {cls.__name__}; load it by {name}.from_pretrained, or FusionHead.from_pretrained")
        head = build(found, config, source)
    _, load_file, corrupt = safetensors()
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, corrupt) as error:
        raise UserError(f"can't read {folder / WEIGHTS} ({first_line(error)})") from error
    restore(head, weights, source)
    return head.eval()


def push(head: FusionHead, repository: str, *, private: bool, message: str) -> str:
    """See FusionHead.push_to_hub."""
    with tempfile.TemporaryDirectory() as folder:
        save(head, folder)
        return upload(repository, {name: Path(folder, name) for name in (WEIGHTS, CONFIG)}, private=private, message=message)


def safetensors() -> tuple[Any, Any, type[Exception]]:
    """Its functions save_file and load_file, and its error. Raises UserError where it isn't installed."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save_file
    except ImportError as error:
        raise UserError("heads are saved by safetensors: pip install safetensors") from error
    return save_file, load_file, SafetensorError


def config_of(head: FusionHead) -> str:
    """The content of config.json. Raises UserError for a head that it would not rebuild."""
    cls, name = type(head), type(head).__name__
    module = "fusion.heads" if getattr(sys.modules["fusion.heads"], name, None) is cls else cls.__module__
    if getattr(sys.modules.get(module), cls.__qualname__, None) is not cls:
        raise UserError(f"the head can't be saved: its class {cls.__qualname__} can't be imported; define it at the top of a module")
    dims = {key: head.level_dims.get(key, width) for key, width in head.dims.items()}
    content = {"format": FORMAT, "class": f"{module}.{name}", "dims": dims, "out_dim": head.out_dim, "init_args": head.init_args}
    try:
        text = json.dumps(content, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"the head can't be saved: the arguments of {name} must be plain data ({first_line(error)})") from error
    expected = {key: tuple(x.shape) for key, x in head.state_dict().items()}
    rebuilt = {key: tuple(x.shape) for key, x in build(cls, json.loads(text), f"this {name}").state_dict().items()}
    if rebuilt != expected:
        different = next(key for key in {**expected, **rebuilt} if rebuilt.get(key) != expected.get(key))
        raise UserError(
            f"the head can't be saved: {name} with arguments {head.init_args} has {different} of shape {rebuilt.get(different)}, "
            f"this head {expected.get(different)}; it must not be changed after construction"
        )
    return text + "\n"


def located(source: str | os.PathLike[str]) -> Path:
    """The folder of a saved head, which is downloaded if `source` is no folder but a name on a hub."""
    folder = Path(source).expanduser()
    if folder.is_dir() and not str(source).startswith(SCHEME):
        return folder
    try:
        model = HubModel.parse(str(source))
    except UserError as error:
        raise UserError(f"there is no folder {source}, nor is that a model on a hub (USER/NAME or USER/NAME@REVISION)") from error
    return download(model, (CONFIG, WEIGHTS))


def read_config(folder: Path, source: object) -> dict[str, Any]:
    """The content of config.json. Raises UserError where it is missing, corrupt, of a newer version or no saved head."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"can't read {folder / CONFIG} ({first_line(error)})") from error
    version = config.get("format") if isinstance(config, dict) else None
    if version is None or any(key not in config for key in KEYS):
        raise UserError(f"{source} is no head saved by fusion: its {CONFIG} lacks {' or '.join(('format', *KEYS))}")
    if version != FORMAT:
        raise UserError(f"{source} has format {version}, this version of fusion reads {FORMAT}: load it with the version that saved it")
    return config


def class_named(name: Any, source: object) -> type[FusionHead]:
    try:
        return head_named(str(name), "unknown head")
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


def build(cls: type[Head], config: dict[str, Any], source: object) -> Head:
    """A head of this configuration with random weights; the random state is left as it was. Raises UserError for arguments that its class
    rejects."""
    try:
        with torch.random.fork_rng(devices=[]), construction():
            return cls(config["dims"], config["out_dim"], **config["init_args"])
    except (TypeError, AttributeError) as error:  # of other types, or unknown to this version
        raise UserError(f"{source}: {cls.__name__} can't be built from its {CONFIG} ({first_line(error)})") from error


def restore(head: FusionHead, weights: dict[str, Tensor], source: object) -> None:
    """Give the head these weights, and their dtypes. Raises UserError for other names or shapes than the head's."""
    own = head.state_dict(keep_vars=True)
    for name in {**own, **weights}:
        if name not in own or name not in weights or own[name].shape != weights[name].shape:
            shapes = [tuple(some[name].shape) if name in some else "nothing" for some in (weights, own)]
            raise UserError(f"{source}: its {WEIGHTS} has {shapes[0]} for {name}, a {type(head).__name__} of its {CONFIG} {shapes[1]}")
    for name, x in own.items():
        x.data = x.data.to(weights[name].dtype)
    head.load_state_dict(weights)
