"""Recipes: found, stacked, resolved; every one that is shipped, and every command of the README."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from small_runs import ROOT

from fusion.cli.schedule import schedule
from fusion.errors import UserError
from fusion.settings.parser import FusionCLI, expand_recipes
from fusion.settings.recipes import recipe_names, stack
from fusion.training.distributed.ddp import DDP
from fusion.training.optim.groups import parameter_groups

WHOLE = ["quickstart", "shapes", "easy_vqa", "vqa_rad", "own"]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_accepted_by_the_command_line(name: str) -> None:
    before = [] if name in WHOLE else ["--recipe=quickstart"]
    more = ["--data.manifest=m.csv"] if name == "own" else []
    config = FusionCLI([*before, f"--recipe={name}", *more]).config
    assert config.model.head.class_path.startswith("fusion.heads.")


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_opens_with_what_it_is_and_its_command(name: str) -> None:
    text = (ROOT / "recipes" / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    if name != "small":
        assert "--recipe" in text.split("\n\n")[0]
        assert "ne override: --" in text


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_recipe_says_nothing_of_the_hardware(name: str) -> None:
    """So that it trains on GPUs where there are some, on the CPU elsewhere, through every example of README; engine/* say more."""
    more = ["--data.manifest=m.csv"] if name == "own" else []
    for fragments in ([], ["--recipe=engine/ddp"], ["--recipe=engine/amp"]):
        trainer = FusionCLI([f"--recipe={name}", *fragments, *more]).config.trainer
        assert trainer.accelerator == "auto"
        assert trainer.num_nodes == 1
        if not fragments:
            assert (trainer.devices, trainer.strategy, trainer.precision, trainer.plugins) == ("auto", "auto", None, None)


@pytest.mark.parametrize(
    ("words", "kind", "unused"),
    [
        (["--trainer.devices=8"], DDP, False),
        (["--trainer.devices=2", "--trainer.strategy=ddp"], DDP, False),
        (["--trainer.devices=2", "--trainer.strategy=ddp_find_unused_parameters_true"], DDP, True),
        (["--trainer.devices=1"], SingleDeviceStrategy, None),
    ],
)
def test_several_processes_are_ours_by_whichever_name_lightning_knows_them(words: list[str], kind: type, unused: bool | None) -> None:
    trainer = FusionCLI(["--recipe=quickstart", "--trainer.accelerator=cpu", "--trainer.logger=false", *words]).make([])[2]
    assert type(trainer.strategy) is kind
    if unused is not None:
        assert trainer.strategy._ddp_kwargs["find_unused_parameters"] is unused


def test_later_recipes_win_and_then_the_command_line() -> None:
    stacked = ["--recipe=quickstart", "--recipe=heads/gated", "--data.batch_size=7"]
    config = FusionCLI(stacked).config
    assert config.model.head.class_path == "fusion.heads.Gated"
    assert config.data.batch_size == 7


def test_a_head_given_by_name_keeps_the_options_that_it_knows() -> None:
    config = FusionCLI(["--recipe=quickstart", "--model.head.init_args.dim=48", "--model.head=Gated"]).config
    assert config.model.head.init_args.dim == 48
    assert "depth" not in config.model.head.init_args


def test_an_interpolation_follows_an_override(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("extends: quickstart\ndata:\n  eval_batch_size: ${data.batch_size}\n")
    assert FusionCLI([f"--recipe={recipe}", "--data.batch_size=48"]).config.data.eval_batch_size == 48


def test_relative_paths_are_seen_from_their_own_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "base.yaml").write_text("data:\n  manifest: there.csv\n")
    (tmp_path / "top.yaml").write_text("extends: deep/base\nmodel:\n  text:\n    init_args: {name_or_path: ./text}\n")
    base, top = stack(str(tmp_path / "top.yaml"))
    assert base.settings["data"]["manifest"] == str(tmp_path / "deep" / "there.csv")
    assert top.settings["model"]["text"]["init_args"]["name_or_path"] == str(tmp_path / "text")


def test_a_recipe_that_extends_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b\n")
    (tmp_path / "b.yaml").write_text("extends: a\n")
    with pytest.raises(UserError, match=r"a\.yaml -> b\.yaml -> a\.yaml"):
        list(stack(str(tmp_path / "a.yaml")))


@pytest.mark.parametrize("text", ["data: [unclosed", "- a\n- list\n", ""])
def test_a_recipe_that_is_no_yaml_of_settings_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        expand_recipes([f"--recipe={tmp_path / 'bad.yaml'}"])


@pytest.mark.parametrize("head", ["Concat", "LevelWeighted", "JointTransformer"])
def test_small_pretrained_gives_encoders_a_twentieth_of_the_heads_rate_and_holds_batch_normalisation(
    head: str, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSION_CACHE", str(world / "cache"))
    bert = "{model_type: bert, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 32}"
    scratch = ["--model.image.pretrained=false", "--model.text.name_or_path=null", f"--model.text.config={bert}"]  # there is no hub here
    shapes = ["--recipe=quickstart", "--data.preparer.scenes=150", "--data.preparer.questions_per_scene=4"]
    task, data = FusionCLI([*shapes, "--recipe=encoders/small_pretrained", *scratch, f"--model.head={head}"]).model_and_data()
    model = task.build(data)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith("encoders.image.") and ".bn" in name} != set()
    model.train()
    task.freezing.apply(model, 0)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms
    assert not any(module.training for module in norms)
    rates = {group["rate"] for group in parameter_groups(model, task.rates)}
    assert max(rates) == 1.0
    assert sorted(rates)[-2] == pytest.approx(0.05)


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.split("  #")[0] for block in blocks for line in block.replace("\\\n", "").splitlines()]
    table = re.findall(r"`(python scripts/fit\.py [^`]*)`", README)
    return [part.strip() for line in [*lines, *table] for part in line.split("&&") if re.search(r"fit(\.py)? --recipe", part)]


@pytest.mark.parametrize("line", readme_commands())
def test_every_fit_command_of_the_readme_is_accepted(line: str) -> None:
    words = shlex.split(line)
    FusionCLI(words[words.index("--recipe") :] if "--recipe" in words else words[2:])


def test_every_schedule_command_of_the_readme_is_drawn(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_CACHE", str(world / "cache"))
    lines = re.findall(r"^python scripts/schedule\.py (.*?)(?:  #|$)", README, flags=re.MULTILINE)
    assert lines
    for line in lines:
        assert schedule([*shlex.split(line), "--data.preparer.scenes=150"]) == 0


def python_with_heads() -> list[str]:
    return [code for code in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if "from fusion.heads" in code]


@pytest.mark.parametrize("place", range(len(python_with_heads())))
def test_the_python_of_the_readme_for_heads_alone_runs(place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    exec(python_with_heads()[place], found)
    if "loss" in found:
        assert found["logits"].shape == (4, 10)
        assert found["loss"].isfinite()
    if "maps" in found:
        assert found["maps"]["layers.1.text.cross_attention"].shape == (4, 4, 12, 49)


def test_a_head_goes_into_a_plain_loop_in_under_fifteen_lines() -> None:
    lines = [line for line in python_with_heads()[0].splitlines() if line]
    assert "CrossAttention" in python_with_heads()[0]
    assert len(lines) < 15
