"""Runs on a Hugging Face Hub: pushed with a model card, loaded without executing anything."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from fusion.deploy.bases import UNKNOWN, pretrained_bases
from fusion.deploy.local_paths import without_paths
from fusion.deploy.model_card import Facts, model_card
from fusion.errors import UserError, first_line
from fusion.hub_files import NAME, HubModel, client, download, upload
from fusion.predictor import Predictor
from fusion.runs.bundle import ABOUT, MODEL, WEIGHTS, is_bundle, read_bundle

CARD, RECIPE, SUMS = "README.md", "recipe.yaml", "checksums.json"
# Settings of encoders and adapters by which a library would import modules, or download code or weights.
EXECUTING = ("attn_implementation", "auto_map", "trust_remote_code", "megatron", "checkpoint_path")
FETCHING = ("name_or_path", "pretrained", "attention")
HARMLESS = (None, False, "", "eager", "sdpa")


class Pushed(NamedTuple):
    """page: of the commit. licence: of the model, as the card states it. unknown: the pretrained encoders whose licence isn't known."""

    page: str
    licence: str
    unknown: list[str]


def push_run(
    run: Path,
    repository: str,
    *,
    private: bool = False,
    message: str = "",
    licence: str | None = None,
    data_sets: Sequence[str] = (),
) -> Pushed:
    """Upload a finished run's model with its card and recipe.

    Args:
        run: the run folder.
        repository: USER/NAME, which is made if there is none.
        private: make a repository that only its owners can read.
        message: of the commit; the run's name if empty.
        licence: of the model, as the hub spells it (apache-2.0); None: that of its pretrained encoders, if they have one in common.
        data_sets: ids on the hub of the data sets that it was trained on.

    Raises UserError for a run without a model, for a name that is none, and what fusion.hub_files.upload raises.
    """
    if not NAME.fullmatch(repository):
        raise UserError(f"'{repository}' is no name of a model on a hub; expected USER/NAME")
    recipe, results = settings_and_results(run)
    if not is_bundle(run / MODEL):
        raise UserError(
            f"{run} has no {MODEL}/{ABOUT}: it was stopped before its end, or made no update. To finish it: fusion fit --resume {run}"
        )
    about, weights = read_bundle(run / MODEL)
    bases = pretrained_bases(recipe, list(about["encoders"]), licence_on_hub)
    parameters = sum(weight.numel() for weight in weights.values())
    facts = Facts(repository, about, recipe, results, bases, parameters, licence, data_sets)
    shared = {**about, "encoders": without_paths(about["encoders"])}
    described = (json.dumps(shared, indent=1, ensure_ascii=False) + "\n").encode()
    sums = {ABOUT: hashlib.sha256(described).hexdigest(), WEIGHTS: sha256(run / MODEL / WEIGHTS)}
    files: dict[str, Path | bytes] = {
        WEIGHTS: run / MODEL / WEIGHTS,
        ABOUT: described,
        SUMS: (json.dumps(sums, indent=1) + "\n").encode(),
        RECIPE: yaml.safe_dump(without_paths(recipe), sort_keys=False, allow_unicode=True).encode(),
        CARD: model_card(facts).encode(),
    }
    page = upload(repository, files, private=private, message=message or f"Push the run {run.resolve().parent.name}/{run.resolve().name}")
    unknown = [base.name for base in bases.values() if base is not None and base.licence == UNKNOWN]
    return Pushed(page, facts.own_licence, list(dict.fromkeys(unknown)))


def settings_and_results(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe of a run, and what results.json says, {} where there is none. Raises UserError for what is no run folder."""
    if not (run / RECIPE).is_file():
        raise UserError(f"{run} has no {RECIPE}; expected the run folder printed by fit" if run.exists() else f"there is no run {run}")
    try:
        recipe = yaml.safe_load((run / RECIPE).read_text(encoding="utf-8"))
        results = json.loads((run / "results.json").read_text(encoding="utf-8")) if (run / "results.json").is_file() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{run}: its recipe or results can't be read ({first_line(error)})") from error
    return recipe, results


def licence_on_hub(repository: str) -> str | None:
    """The licence of a model according to the hub; None if it states none, or can't be asked."""
    try:
        with client(repository) as hub:
            card: Any = hub.HfApi().model_info(repository).card_data
    except UserError:  # no network, or not on this hub: the card then says that the licence is unknown
        return None
    licence = None if card is None else card.get("license")
    return licence if isinstance(licence, str) else None


def load_from_hub(name: str, *, device: str | torch.device | None = None, trusted: Sequence[str] = ()) -> Predictor:
    """The model hf://USER/NAME[@REVISION], in eval mode.

    Args:
        name: of the model.
        device: as for Predictor.load.
        trusted: packages that may be imported for classes outside fusion; such classes are otherwise found only if they are imported
            already, since importing a module executes its code.

    Raises UserError for a model that isn't there, was not pushed by fusion, was altered since, or needs code from elsewhere.
    """
    return Predictor.from_file(model_folder(name), device=device, trusted=trusted)


def model_folder(name: str) -> Path:
    """The folder of a downloaded model, checked. Raises UserError as `load_from_hub` does."""
    model = HubModel.parse(name)
    folder = download(model, (ABOUT, WEIGHTS, SUMS))
    try:
        sums = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{model}: {SUMS} or {ABOUT} can't be read ({first_line(error)}); download it again (cache: {folder})") from error
    for file in (ABOUT, WEIGHTS):
        if not isinstance(sums, dict) or sums.get(file) != sha256(folder / file):
            raise UserError(
                f"{model}: {file} was altered since it was pushed, by its checksum; push it again, or remove {folder} from the cache"
            )
    reject_code(about, str(model))
    return folder


def reject_code(about: Any, model: str) -> None:
    """Raises UserError for settings by which a library would import code, or fetch code or weights from elsewhere.

    (Which classes may be imported is decided where they are looked up: fusion.rebuilding.importing_only.)
    """
    encoders = about.get("encoders") if isinstance(about, dict) else None
    if not isinstance(encoders, dict):
        raise UserError(f"{model}: its {ABOUT} has no encoders: it was not written by fusion")
    found = executing({"encoders": encoders, "adapters": about.get("adapters")})
    for name, spec in encoders.items():
        own = spec.get("init") if isinstance(spec, dict) else None
        options = own if isinstance(own, dict) and str(spec.get("class")).startswith("fusion.") else {}
        found += [f"encoders.{name}.{key}" for key in FETCHING if not is_harmless(options.get(key))]
        if ":" in str(options.get("name", "")):
            found.append(f"encoders.{name}.name")
    if found:
        raise UserError(f"{model}: its {ABOUT} sets {', '.join(found)}, which could execute code or fetch other files; not loaded")


def executing(value: Any, path: str = "") -> list[str]:
    """The settings in plain data that could execute code, by their paths."""
    if isinstance(value, list):
        return [found for one in value for found in executing(one, path)]
    if not isinstance(value, Mapping):
        return []
    found = []
    for key, one in value.items():
        where = f"{path}.{key}".lstrip(".")
        if any(name in str(key) for name in EXECUTING) and not is_harmless(one):
            found.append(where)
        found += executing(one, where)
    return found


def is_harmless(value: Any) -> bool:
    return value in HARMLESS if isinstance(value, str | bool) or value is None else value in ({}, [])


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
