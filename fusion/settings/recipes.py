"""Recipes: YAML files found by name or path, stacked by `extends`, with their relative paths made absolute."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fusion.errors import UserError, nearest

# Keys whose values are paths. Values of other keys are paths if they begin with ./ or ../
PATH_KEYS = {"manifest", "val_manifest", "test_manifest", "root", "cache"}


@dataclass(frozen=True)
class Recipe:
    """The settings of one file, with absolute paths and without `extends`; not merged, interpolations not resolved."""

    path: Path
    settings: dict[str, Any]

    def to_yaml(self) -> str:
        return OmegaConf.to_yaml(OmegaConf.create(self.settings))


def shipped() -> Path:
    """The folder of recipes/ and data/: the repository, or a folder of the installed package."""
    package = Path(__file__).parents[1]
    inside = package / "shipped"
    return inside if inside.is_dir() else package.parent


def recipe_names() -> list[str]:
    folder = shipped() / "recipes"
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def find_recipe(name: str, near: Path | None = None) -> Path:
    """The file of a recipe: a path (also relative to `near`), or a name under recipes/. Raises UserError that names the nearest."""
    places = [Path(name).expanduser(), shipped() / "recipes" / f"{name}.yaml"]
    if near is not None:
        places = [near / name, near / f"{name}.yaml", *places]
    for place in places:
        if place.is_file():
            return place.resolve()
    if name.endswith((".yaml", ".yml")):
        raise UserError(f"there is no recipe file {name}")
    raise UserError(f"unknown recipe '{name}'. {nearest(name, recipe_names())}")


def stack(name: str, near: Path | None = None, inside: tuple[Path, ...] = ()) -> Iterator[Recipe]:
    """A recipe, preceded by those that it extends; later ones override earlier ones."""
    path = find_recipe(name, near)
    if path in inside:
        raise UserError(f"recipe {path} extends itself: {' -> '.join(p.name for p in [*inside, path])}")
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OmegaConfBaseException, OSError, ValueError) as error:
        raise UserError(f"recipe {path} can't be read: {error}") from error
    except Exception as error:  # yaml's errors have no base class in common with the above
        if type(error).__module__.split(".")[0] != "yaml":
            raise
        raise UserError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict) or not loaded:
        raise UserError(f"recipe {path} has no settings; expected keys such as data, model and trainer")
    settings = {str(key): value for key, value in loaded.items()}
    written = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader).get("data")
    if isinstance(written, dict) and isinstance(written.get("where"), dict):
        settings["data"]["where"] = written["where"]  # values as written: YAML would read 010 as 8, and yes as a boolean
    extends = settings.pop("extends", [])
    for extended in [extends] if isinstance(extends, str) else extends:
        yield from stack(extended, path.parent, (*inside, path))
    yield Recipe(path, absolute(settings, path.parent))


def absolute(value: Any, folder: Path, key: str = "") -> Any:
    """`value` with its relative paths made absolute, resolved from `folder`."""
    if isinstance(value, dict):
        return {name: absolute(inner, folder, str(name)) for name, inner in value.items()}
    if isinstance(value, list):
        return [absolute(inner, folder) for inner in value]
    is_path = isinstance(value, str) and (value.startswith(("./", "../")) or (key in PATH_KEYS and not value.startswith(("$", "~"))))
    return str((folder / value).resolve()) if is_path else value
