"""Structured pruning of a run: units are removed from its blocks, so that it is smaller and faster."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tokenizers import models

from fusion.data.kinds import TextInput
from fusion.data.table import Table
from fusion.deploy.pruning.importance import Importance, cut, parameters, ratio_for
from fusion.deploy.pruning.source import Source, check_free, state_bytes, write_start
from fusion.deploy.pruning.statistics import Moments, input_moments
from fusion.encoders import Encoder, TransformersText
from fusion.errors import UserError
from fusion.model import FusionModel, part_of
from fusion.processing.vocabulary import trimmed
from fusion.pruning.blocks import find_groups, has_adapters
from fusion.pruning.groups import Group
from fusion.rebuilding import class_of
from fusion.runs.bundle import PRUNED

KEEP = 0.6
SAMPLES = 256  # of train, from which the means of removed units come


@dataclass(frozen=True)
class Removed:
    """Units of one kind in one part of the model: how many there were, and how many are left."""

    part: str
    kind: str
    before: int
    after: int


@dataclass(frozen=True)
class Pruned:
    """What pruning removed.

    folder: the pruned model, not yet trained further. keep: the ratio of kept units. removed: by part and kind. untouched: by part, why
    nothing was removed. parameters, bytes: before and after. note: about the checkpoint, or "".
    """

    folder: Path
    keep: float
    removed: list[Removed]
    untouched: dict[str, str]
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    note: str

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "keep": self.keep,
            "removed": [vars(one) for one in self.removed],
            "untouched": self.untouched,
            "parameters": list(self.parameters),
            "bytes": list(self.bytes),
        }


def prune(
    run: str | Path,
    out: str | Path,
    *,
    keep: float | None = None,
    times: float | None = None,
    vocabulary: bool = True,
    skip: Sequence[str] = (),
    by: Importance = "variance",
    samples: int = SAMPLES,
    checkpoint: str = "best",
) -> Pruned:
    """Removes units from the blocks of a run's model: feed-forward units, attention heads, channels of convolutions.

    Blocks that take no part in predictions, such as a retrieval head's matcher, are left as they are. What a removed unit contributed on
    average is added to the bias that follows, and what is linear in the kept ones to their weights (`refit`). `fine_tune` then trains a run
    from the result.

    Args:
        run: run folder.
        out: folder to write; it must not have anything in it.
        keep: ratio of the units of each group that are kept, above 0; 0.6 if neither this nor `times` is given.
        times: instead, how many times fewer parameters the model shall have.
        vocabulary: whether word embeddings of tokens that no training text has are removed, where the tokenizer allows it.
        skip: patterns of names of groups that are left as they are, or parts: "image", "text.*attention*".
        by: importance of a unit: "variance", or "magnitude" of its weights alone (`importance_of`).
        samples: number of training samples from which means and covariances come.
        checkpoint: best or last.

    Raises UserError for a run without checkpoint or data, a ratio out of range, and a model without anything to remove.
    """
    keep = KEEP if keep is None and times is None else keep
    check_options(keep, times, by, samples)
    folder = Path(out).expanduser()
    check_free(folder)
    source = Source(run, checkpoint)
    model = source.predictor.model
    before = parameters(model), state_bytes(model.state_dict())
    groups = find_groups(model)
    sizes = {name: group.units for name, group in groups.items()}
    chosen = {name: group for name, group in groups.items() if not any(skipped(name, pattern) for pattern in skip)}
    reject_unknown(skip, groups)
    table = source.train_table()
    tokens = trim_vocabularies(source, table, skip) if vocabulary else []
    if not chosen and not tokens:
        raise UserError(f"{source.run}: there is nothing to remove: {'; '.join(f'{n}: {why}' for n, why in untouched(model, {}).items())}")
    layers = [consumer.layer for group in chosen.values() for consumer in group.consumers]
    moments = input_moments(model, layers, source.samples(table, samples))
    if layers and not moments[0].count:
        raise UserError(f"{source.run}: none of its training samples can be read, from which the means of removed units come")
    chosen, moments = called(chosen, moments)
    keep = keep or ratio_for(model, chosen, int(before[0] / (times or 1)))
    widths = cut(chosen, moments, keep, by)
    if not widths and not tokens:
        raise UserError(f"--keep {keep:g}: no unit would be removed; expected a smaller ratio")
    pruned = source.about.get(PRUNED, {}) | widths
    source.recipe["model"][PRUNED] = pruned or None
    encoders = {name: source.about["encoders"][name] | {"init": encoder.spec()} for name, encoder in encoders_of(model).items()}
    about = source.about | {"encoders": encoders, PRUNED: pruned, "processor": source.predictor.processor.state()}
    write_start(folder, source, about, source.recipe)
    after = parameters(model), state_bytes(model.state_dict())
    removed = by_part(groups, sizes) + tokens
    return Pruned(folder, keep, removed, untouched(model, groups), (before[0], after[0]), (before[1], after[1]), source.note)


def called(groups: Mapping[str, Group], moments: Sequence[Moments]) -> tuple[dict[str, Group], list[Moments]]:
    """The groups whose layers take part in predictions, as a retrieval head's matcher doesn't, and the moments of their inputs.

    moments: of the inputs of each consumer of each group, in order.
    """
    remaining, kept, of_kept = list(moments), {}, []
    for name, group in groups.items():
        own = [remaining.pop(0) for _ in group.consumers]
        if all(one.count for one in own):
            kept[name] = group
            of_kept += own
    return kept, of_kept


def check_options(keep: float | None, times: float | None, by: str, samples: int) -> None:
    if keep is not None and times is not None:
        raise UserError("give either --keep (a ratio of units) or --times (fewer parameters), not both")
    if keep is not None and not 0 < keep <= 1:
        raise UserError(f"--keep is {keep:g}; expected a ratio above 0, at most 1, such as 0.5")
    if times is not None and not times > 1:
        raise UserError(f"--times is {times:g}; expected a number above 1, such as 2 for half the parameters")
    if by not in ("variance", "magnitude"):
        raise UserError(f"--by is {by}; expected variance or magnitude")
    if samples < 1:
        raise UserError(f"--calibration_samples is {samples}; expected at least 1")


def skipped(name: str, pattern: str) -> bool:
    """Whether a pattern is the part that a group belongs to, or matches its name."""
    return part_of(name) == pattern or fnmatchcase(name, pattern)


def reject_unknown(skip: Sequence[str], groups: Mapping[str, Group]) -> None:
    for pattern in skip:
        if not any(skipped(name, pattern) for name in groups):
            raise UserError(f"--skip: nothing that could be removed matches '{pattern}'; the first is {next(iter(groups), 'none')}")


def encoders_of(model: FusionModel) -> dict[str, Any]:
    return dict(model.encoders.items())


# Vocabulary


def trim_vocabularies(source: Source, table: Table, skip: Sequence[str]) -> list[Removed]:
    """Removes the embeddings of tokens that no training text has, of encoders whose recipe can say so; and says so in the recipe."""
    found = []
    for name, encoder in encoders_of(source.predictor.model).items():
        kind, settings = source.predictor.processor.inputs[name], encoder_settings(source.recipe, name)
        if name in skip or has_adapters(encoder) or settings is None or not isinstance(kind, TextInput):
            continue
        options = settings.get("init_args") or {}
        is_pretrained = class_of({"class": settings["class_path"]}, Encoder) is TransformersText and options.get("name_or_path") is not None
        if not is_pretrained or options.get("trim_vocabulary") or not isinstance(kind.tokenizer.backend.model, models.WordPiece):
            continue
        before = encoder.vocab_size
        kind.tokenizer, rows = trimmed(kind.tokenizer, [text for text in table.inputs[name] if text])
        encoder.keep_tokens(rows)
        settings["init_args"] = options | {"trim_vocabulary": True}
        found.append(Removed(name, "tokens", before, len(rows)))
    return found


def encoder_settings(recipe: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """The settings of an encoder in a recipe: model.text, or model.encoders.text."""
    model = recipe["model"]
    settings = (model.get("encoders") or {}).get(name) or model.get(name)
    return settings if isinstance(settings, dict) else None


# Report


def by_part(groups: Mapping[str, Group], sizes: Mapping[str, int]) -> list[Removed]:
    """How many units there were, and are, by part of the model and kind."""
    totals: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for name, group in groups.items():
        total = totals[part_of(name), group.kind]
        total[0] += sizes[name]
        total[1] += group.units
    return [Removed(part, kind, before, after) for (part, kind), (before, after) in totals.items()]


def untouched(model: FusionModel, groups: Mapping[str, Group]) -> dict[str, str]:
    """By part of the model that has nothing to remove, why."""
    reasons = {}
    for name, module in model.parts().items():
        if not any(part_of(group) == name for group in groups):
            kind = type(getattr(module, "body", module)).__name__
            adapters = isinstance(module, Encoder) and has_adapters(module)
            reasons[name] = f"{kind} has adapters" if adapters else f"{kind} has no block of a kind that can be pruned"
    return reasons
