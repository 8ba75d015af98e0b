"""The list of heads, what is told of each, and that all places that list them agree."""

import re
from pathlib import Path

import pytest

import fusion.heads
from fusion.heads import FusionHead, available, describe
from fusion.heads.registry import HEADS

ROOT = Path(__file__).parents[2]
LATE = ["LogitMean", "WeightedLogits", "ProductOfExperts", "ConfidenceWeighted", "PredictedConfidence", "Stacking"]


def test_every_head_of_the_package_is_listed_once_and_exported() -> None:
    bases = {
        "base",
        "late",
        "registry",
        "all_heads",
        "attention",
        "missing_tokens",
        "unimodal",
        "dual_encoder",
        "per_task",
        "by_name",
        "saved",
        "__init__",
    }
    files = {path.stem for path in (ROOT / "fusion" / "heads").glob("*.py")} - bases
    assert {head.__module__.removeprefix("fusion.heads.") for head in HEADS.values()} == files
    assert len(HEADS) == len(files)
    assert all(getattr(fusion.heads, name) is head for name, head in HEADS.items())


def test_heads_are_found_by_pattern_and_by_family() -> None:
    assert available("Low*") == ["LowRankTensor"]
    assert available("*Attention") == ["CrossAttention", "CoAttention", "GatedCrossAttention"]
    assert available(family="late") == LATE
    assert available("P*", family="late") == ["ProductOfExperts", "PredictedConfidence"]
    assert available("Nothing*") == []
    families = [available(family=family) for family in ("early", "intermediate", "late", "cross-attention")]
    assert sorted(name for names in families for name in names) == sorted(available())


def test_an_unknown_family_or_head_is_refused_with_what_there_is() -> None:
    with pytest.raises(ValueError, match="unknown family 'lat'; expected one of early, intermediate, late"):
        available(family="lat")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown head 'Gatd'; nearest: Gated"):
        describe("Gatd")
    with pytest.raises(ValueError, match="unknown head '12345'; expected one of JointTransformer"):
        describe("12345")


@pytest.mark.parametrize("name", HEADS)
def test_every_head_tells_its_idea_formula_source_shapes_and_cost(name: str) -> None:
    info = describe(name)
    assert info.family in ("early", "intermediate", "late", "cross-attention")
    assert all(text.endswith(".") for text in (info.idea, info.source, info.reads, info.cost)), info
    assert "(B, " in info.reads
    assert "dim" in info.cost or "LogitMean" in info.cost
    text = HEADS[name].__doc__ or ""
    formula = text.split("\n\n")[1]
    assert formula.startswith("        ")
    assert "y = " in formula or "y_c = " in formula
    assert f">>> head = {name}(" in text or f"{name}({{" in text


@pytest.mark.parametrize("name", HEADS)
def test_every_head_has_a_recipe_fragment_and_a_row_of_the_readme(name: str) -> None:
    fragments = [path for path in (ROOT / "recipes" / "heads").glob("*.yaml") if f"class_path: fusion.heads.{name}\n" in path.read_text()]
    assert [path.stem for path in fragments] == [HEADS[name].__module__.rpartition(".")[2]]
    (row,) = re.findall(rf"^\| `{name}` \|(.*)\|$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    family, stage, *_ = (cell.strip() for cell in row.split("|"))
    assert (family, stage) == (HEADS[name].family, HEADS[name].stage)


def test_a_head_without_its_docstring_is_still_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under python -OO."""
    monkeypatch.setattr(HEADS["Gated"], "__doc__", None)
    monkeypatch.setattr(FusionHead, "__doc__", None)
    assert describe("Gated")[:3] == ("Gated", "intermediate", "pooled")
