"""The model card of a run: README.md with metadata for a hub, scores, evidence, inputs and licences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from fusion.console import figure
from fusion.deploy.bases import UNKNOWN, Base, encoder_settings
from fusion.deploy.local_paths import base_name, is_local, without_paths
from fusion.evaluation.bounds import bound_title
from fusion.tasks import MultiTask, Task

SHOWN_NAMES = 30  # classes or labels that are listed
# The Hub's names of what a model does, where one fits; by the kinds of inputs and the task.
PIPELINES = {
    (("image",), "Classification"): "image-classification",
    (("text",), "Classification"): "text-classification",
    (("image", "text"), "Classification"): "visual-question-answering",
    (("table",), "Classification"): "tabular-classification",
    (("table",), "Regression"): "tabular-regression",
    (("image", "text"), "Retrieval"): "feature-extraction",
}


@dataclass(frozen=True)
class Facts:
    """What a model card is written from.

    repository: USER/NAME. about: the content of model.json. recipe: the run's settings, with local paths. results: those of results.json,
    {} for a run without. bases: by input, what its encoder started from; None where it was trained from scratch, or from a local folder.
    parameters: their number. licence: of the model; None: that of its bases, if they have one in common. data_sets: the ids on the hub of
    those it was trained on.
    """

    repository: str
    about: Mapping[str, Any]
    recipe: Mapping[str, Any]
    results: Mapping[str, Any]
    bases: Mapping[str, Base | None]
    parameters: int
    licence: str | None = None
    data_sets: Sequence[str] = ()

    @property
    def task(self) -> Task:
        return Task.from_state(self.about["processor"]["task"])

    @property
    def kinds(self) -> dict[str, str]:
        """By input, the name of its kind: image, text, table; in lower case that of its class."""
        inputs: Mapping[str, Any] = self.about["processor"]["inputs"]
        return {name: short(kind["class"]).removesuffix("Input").lower() for name, kind in inputs.items()}

    @property
    def own_licence(self) -> str:
        """The licence given, or that of all the pretrained encoders; "unknown" where they differ, there are none, or one is a local
        folder."""
        found = {base.licence for base in self.bases.values() if base is not None}
        found |= {UNKNOWN for name, base in self.bases.items() if base is None and local_source(self.recipe, name)}
        return self.licence or (found.pop() if len(found) == 1 else UNKNOWN)


def model_card(facts: Facts) -> str:
    """The content of README.md."""
    sections = [
        f"# {facts.repository.partition('/')[2]}",
        introduction(facts),
        f"## Use\n\n{usage(facts)}",
        f"## Scores\n\n{scores(facts)}",
        f"## Inputs\n\n{inputs(facts)}",
        f"## Recipe\n\n{recipe_summary(facts)}",
    ]
    return f"---\n{yaml.safe_dump(metadata(facts), sort_keys=False, allow_unicode=True)}---\n\n" + "\n\n".join(sections) + "\n"


def metadata(facts: Facts) -> dict[str, Any]:
    """The metadata that a hub reads, without what is not known."""
    kinds, task = tuple(sorted(set(facts.kinds.values()))), type(facts.task).__name__
    bases = list(dict.fromkeys(base.name for base in facts.bases.values() if base is not None))
    found: dict[str, Any] = {
        "license": facts.own_licence,
        "library_name": "fusion",
        "pipeline_tag": PIPELINES.get((kinds, task)),
        "tags": ["fusion", *(["multimodal"] if len(facts.kinds) > 1 else []), *kinds, task, short(facts.about["head"]["class"])],
        "base_model": bases,
        "datasets": list(facts.data_sets),
    }
    return {name: value for name, value in found.items() if value}


def introduction(facts: Facts) -> str:
    head, task = short(facts.about["head"]["class"]), facts.task
    names = "" if isinstance(task, MultiTask) or not task.names else f" ({listed(task.names)})"
    return (
        f"A model of {' and '.join(facts.kinds)} with the fusion head `{head}`, for the task `{type(task).__name__}`{names}; "
        f"{facts.parameters:,} parameters. Trained by the library `fusion`."
    )


def usage(facts: Facts) -> str:
    usual = {"image": 'images=["photo.jpg"]', "text": 'texts=["a text"]'}
    arguments = ", ".join(usual.get(name, f"{name}=[...]") for name in facts.kinds)
    packages = other_packages(facts.about)
    trusted = f", trusted={packages}" if packages else ""
    executes = f"loading imports {listed(packages)}, which its classes are part of" if packages else "loading executes no code"
    return (
        f'```python\nimport fusion\n\nmodel = fusion.load("hf://{facts.repository}"{trusted})\nanswer = model.predict({arguments})\n'
        "answer.answers, answer.values, answer.present\n```\n\n"
        "Needs `fusion` with its extras `hub` and `train`. `None` stands for an input that a sample lacks. The files are weights "
        f"(safetensors) and JSON; {executes}."
    )


def other_packages(about: Any) -> list[str]:
    """The packages outside fusion that have classes of a model."""
    if isinstance(about, Mapping):
        own = [str(about["class"]).partition(".")[0]] if isinstance(about.get("class"), str) else []
        found = own + [name for value in about.values() for name in other_packages(value)]
    else:
        found = [name for value in about for name in other_packages(value)] if isinstance(about, list) else []
    return sorted({name for name in found if name != "fusion"})


def scores(facts: Facts) -> str:
    """The scores on test, and the evidence: bounds on what one input alone, or one answer for all, can reach on the same samples."""
    task, test = facts.task, dict(facts.results.get("test") or {})
    if not test:
        return "The run had no test samples: nothing was scored."
    bounds = {name: test.pop(name) for name in list(test) if name.startswith(("ceiling_", "floor_"))}
    count = facts.results.get("test_samples")
    headline = {title: name for title, name in task.headline.items() if name in test}
    samples = "an unrecorded number of samples" if count is None else f"{count:,} samples"
    lines = [["test", *headline], ["**this model**", *(figure(test[name]) for name in headline.values())]]
    for name, bound in bounds.items():
        entries = [figure(bound) if name_of == task.bounded else "" for name_of in headline.values()]
        lines.append([bound_title(task, name.partition("_")[2]), *entries])
    if bounds:
        meaning = (
            "The bounds are computed from the labels of the same samples: no model of that input alone, and no single answer for all, can "
            "do better. Inputs that don't repeat among the samples have none."
        )
    else:
        meaning = "No bounds were computed for these samples."
    others = ", ".join(f"{name} {figure(value)}" for name, value in test.items() if name not in headline.values())
    return f"On the test split, {samples}:\n\n{markdown(lines)}\n\n{meaning}" + (f"\n\nAll other scores: {others}." if others else "")


def inputs(facts: Facts) -> str:
    lines = [["input", "kind", "columns", "encoder", "started from", "licence of that"]]
    states: Mapping[str, Any] = facts.about["processor"]["inputs"]
    for name, kind in facts.kinds.items():
        columns = states[name]["init"].get("column") or states[name]["init"].get("columns") or []
        encoder, base = facts.about["encoders"][name], facts.bases[name]
        lines.append(
            [
                name,
                kind,
                listed([columns] if isinstance(columns, str) else list(columns)),
                f"{short(encoder['class'])} {architecture(encoder['init'])}".strip(),
                f"[{base.name}](https://huggingface.co/{base.name})" if base else started(facts.recipe, name),
                base.licence if base else "",
            ]
        )
    return f"{markdown(lines)}\n\nLicences are those that the sources state, as far as known here."


def recipe_summary(facts: Facts) -> str:
    recipe = without_paths(facts.recipe)
    data, trainer, model = (recipe.get(part) or {} for part in ("data", "trainer", "model"))
    preparer = data.get("preparer")
    source = preparer["class_path"] if isinstance(preparer, Mapping) else preparer
    if isinstance(preparer, Mapping) and (path := (preparer.get("init_args") or {}).get("path")):
        source = path
    lines = [
        ["data", code(base_name(str(source or data.get("manifest") or UNKNOWN)))],
        ["batch size", str(data.get("batch_size"))],
        ["epochs at most", str(trainer.get("max_epochs"))],
        ["updates made", f"{facts.results['updates']:,}" if "updates" in facts.results else UNKNOWN],
        ["optimizer", code(class_and_options(model.get("optimizer")))],
        ["schedule", code(class_and_options(model.get("schedule")))],
        ["seed", str(recipe.get("seed_everything"))],
    ]
    return (
        f"Every setting is in `recipe.yaml`, which is itself a recipe; local paths are reduced to names.\n\n{markdown([['', ''], *lines])}"
    )


def started(recipe: Mapping[str, Any], name: str) -> str:
    """How an encoder started that no hub has."""
    source = local_source(recipe, name)
    if source:
        return f"a local folder, `{base_name(source)}`"
    return "weights of another run" if recipe.get("init_from") else "scratch"


def local_source(recipe: Mapping[str, Any], name: str) -> str:
    """The folder of this machine that an encoder's pretrained weights came from; "" if they came from none."""
    options = encoder_settings(recipe, name).get("init_args") or {}
    source = str(options.get("name_or_path") or options.get("name") or "")
    return source if options.get("pretrained", True) and is_local(source) else ""


def architecture(options: Mapping[str, Any]) -> str:
    found = (options.get("config") or {}).get("model_type") or options.get("name") or ""
    return f"`{base_name(found)}`" if found else ""


# Text


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table, the first line of which is its header."""
    rows = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])


def class_and_options(spec: Any) -> str:
    if not isinstance(spec, Mapping) or "class_path" not in spec:
        return str(spec)
    options = ", ".join(f"{name}={value}" for name, value in (spec.get("init_args") or {}).items())
    return f"{short(spec['class_path'])}({options})"


def code(text: str) -> str:
    return f"`{text}`"


def short(path: str) -> str:
    return path.rpartition(".")[2]


def listed(names: Sequence[Any]) -> str:
    """
    >>> listed(["yes", "no"])
    'yes, no'
    """
    shown = ", ".join(map(str, names[:SHOWN_NAMES]))
    return f"{shown} and {len(names) - SHOWN_NAMES:,} more" if len(names) > SHOWN_NAMES else shown
