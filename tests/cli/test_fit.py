"""fusion fit: what it prints, what it leaves behind, and what it says to mistakes."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from small_runs import TINY, InProcess, Run

from fusion.heads import available
from fusion.session import fit


def test_a_run_prints_its_plan_and_its_result(command: Run) -> None:
    done = command("fit", *TINY)
    assert done.returncode == 0, done.stderr
    for words in (
        "image-only",
        "samples: ",
        "parameters",
        "global batch 16",
        "updates",
        "precision",
        "samples/s",
        "this model",
        "run folder",
    ):
        assert words in done.stdout
    assert "Traceback" not in done.stderr


def test_a_run_folder_holds_all_it_takes_to_run_again(trained: Path) -> None:
    files = (
        "recipe.yaml",
        "metrics.csv",
        "results.json",
        "data_issues.csv",
        "environment.json",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
    )
    assert all((trained / name).is_file() for name in files)
    results = json.loads((trained / "results.json").read_text())["test"]
    assert {"accuracy", "ceiling_image", "ceiling_text", "ceiling_majority"} <= results.keys()
    with open(trained / "metrics.csv") as file:
        assert any(row["train/loss_step"] for row in csv.DictReader(file))


def test_the_checkpoint_holds_plain_data_only(trained: Path) -> None:
    held = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    assert held["fusion"]["processor"]["task"]["learnt"]["names"]


def test_the_saved_recipe_runs_again_to_the_same_result(here: Run, trained: Path, world: Path) -> None:
    done = here("fit", f"--config={trained / 'recipe.yaml'}", "--runs=again")
    assert done.returncode == 0, done.stderr
    (again,) = (world / "again" / "fit").iterdir()
    assert json.loads((again / "results.json").read_text()) == json.loads((trained / "results.json").read_text())


@pytest.mark.parametrize(
    ("limit", "told"),
    [(2, r"this model .* 8\nupper bound \(image only\) +0\.\d+ +\d{2,}\n"), (0, "no test samples: nothing scored")],
)
def test_a_share_of_the_test_split_is_told_as_such(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], limit: int, told: str
) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setenv("FUSION_CACHE", str(world / "cache"))
    share = ["--data.eval_batch_size=4", "--trainer.max_steps=1", f"--trainer.limit_test_batches={limit}", f"--runs=runs-{limit}"]
    assert fit([*TINY, *share]) == 0
    assert re.search(told, capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("head", available())
def test_every_head_trains_by_its_name_alone(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], head: str
) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setenv("FUSION_CACHE", str(world / "cache"))
    shape = [option for option in TINY if "head" not in option]
    few = [f"--trainer.limit_{split}_batches=4" for split in ("train", "val", "test")]
    assert fit([*shape, *few, f"--model.head={head}", f"--runs=runs-{head}"]) == 0
    assert f"head   {head}" in capsys.readouterr().out


DDP = [*TINY, "--recipe=engine/ddp", "--trainer.accelerator=cpu"]
MISTAKES = {
    "recipe": (["--recipe", "quikstart"], "Did you mean quickstart?"),
    "option": ([*TINY, "--modl.head=Gated"], "Did you mean model.head"),
    "abbreviation": ([*TINY, "--trainer.max_epoch=2"], "Did you mean trainer.max_epochs"),
    "head": ([*TINY[:5], "--model.head=Gatd"], "Did you mean Gated?"),
    "head option": (["--recipe=quickstart", "--model.head=Gated", "--model.head.init_args.dm=3"], "Did you mean dim?"),
    "encoder class": ([*TINY, "--model.image=TimImage"], "Did you mean TimmImage or PairImage?"),
    "encoder name": ([*TINY, "--model.image.name=resnet1t"], "Did you mean resnet"),
    "type": ([*TINY, "--data.batch_size=many"], "data.batch_size: expected int, got many"),
    "type or null": ([*TINY, "--trainer.max_epochs=many"], "trainer.max_epochs: expected int or null, got many\n"),
    "type of a schedule's option": ([*TINY, "--model.schedule.init_args.warmup=x"], "warmup: expected float, got x\n"),
    "devices": ([*TINY, "--trainer.accelerator=cpu", "--trainer.devices=zwei"], "should be an int > 0"),
    "accelerator": ([*TINY, "--trainer.accelerator=tpu"], "pip install -U 'torch_xla"),
    "modality": ([*TINY, "--model.modalities=[txt]"], "Did you mean text?"),
    "schedule": ([*TINY, "--model.schedule=Cosin"], "Did you mean Cosine?"),
    "head refuses": ([*TINY, "--model.head.init_args.num_heads=7"], "not a multiple of num_heads 7"),
    "option of the strategy": ([*DDP, "--trainer.strategy.init_args.compres=sign"], "DDP has no option 'compres'. Did you mean compress?"),
    "word for an option": (
        [*DDP, "--trainer.strategy.init_args.compress=sgn"],
        "compress: unknown value sgn. Did you mean sign?",
    ),
    "word for a number": ([*DDP, "--trainer.strategy.init_args.timeout_s=soon"], "init_args.timeout_s: expected float, got soon\n"),
    "option of no strategy": ([*TINY, "--trainer.strategy.init_args.compress=sign"], "with --trainer.strategy=CLASS or in a recipe\n"),
    "option of no balance": ([*TINY, "--model.balance.init_args.alpha=1"], "with --model.balance=CLASS (UnimodalLosses, OGMGE, MMPareto"),
    "option of a class that has none": (
        [*TINY, "--trainer.plugins=lightning.pytorch.plugins.DoublePrecision", "--trainer.plugins.init_args.scale=2"],
        "DoublePrecision has no option 'scale'",
    ),
    "nothing": ([], "--recipe quickstart"),
    "no data": (["--recipe=own"], "--data.manifest=FILE"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line_with_the_nearest_known_name(in_process: InProcess, mistake: str) -> None:
    arguments, words = MISTAKES[mistake]
    status, told = in_process("fit", arguments)
    assert status == 2
    assert words in told
    assert told.startswith("error: ")
    assert told.count("\n") == 1


def test_an_unknown_key_three_levels_deep_is_named_with_its_recipe(in_process: InProcess, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("extends: quickstart\nmodel:\n  head:\n    init_args:\n      dropuot: 0.1\n")
    status, told = in_process("fit", ["--recipe", str(recipe)])
    assert status == 2
    assert "CrossAttention has no option 'dropuot'. Did you mean dropout?" in told
    assert "mine.yaml" in told


def test_a_run_folder_that_cannot_be_written_is_one_error(in_process: InProcess, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    status, told = in_process("fit", [*TINY, f"--runs={tmp_path / 'file'}"])
    assert status == 2
    assert "--runs=FOLDER" in told


def test_resuming_something_that_is_no_run_is_one_error(in_process: InProcess, tmp_path: Path) -> None:
    status, told = in_process("fit", ["--resume", str(tmp_path)])
    assert status == 2
    assert "recipe.yaml" in told
