"""The edges of a run: progress and its callbacks, metrics that aren't there, runs that validate nothing or make no update."""

import re
import sys

import pytest
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from tiny_world import BERT, EARLY, NO_VALIDATION, SELDOM, SHORT
from transformers import AutoConfig, AutoModel, BertTokenizerFast

import fusion
import fusion.training.callbacks.progress as progress
from fusion.cli.evaluate import evaluate
from fusion.cli.predict import predict
from fusion.errors import UserError
from fusion.session import fit
from fusion.settings.parser import FusionCLI
from fusion.tasks import Classification
from fusion.training.callbacks.progress import Bar, EpochLines

# Progress.


@pytest.mark.parametrize(
    ("options", "bars"),
    [
        ([], [Bar]),
        (["--trainer.enable_progress_bar=false"], []),
        (["--trainer.callbacks+=RichProgressBar"], [RichProgressBar]),
    ],
    ids=["default", "off", "rich"],
)
def test_there_is_one_bar_at_most_and_always_a_line_an_epoch(tiny, options, bars, capsys, tmp_path):
    recipe = tiny()
    trainer = FusionCLI(["--recipe", str(recipe), *options]).make([EpochLines()])[2]
    assert [type(callback) for callback in trainer.callbacks if isinstance(callback, ProgressBar)] == bars
    assert fit(["--recipe", str(recipe), *SHORT, *options]) == 0
    assert len(re.findall(r"^epoch 1/1  loss \d", capsys.readouterr().out, re.MULTILINE)) == 1


def test_a_log_has_lines_within_an_epoch_and_a_terminal_with_a_bar_has_none(tiny, fit_here, monkeypatch, capsys):
    def lines():
        monkeypatch.setattr(progress.EpochLines.__init__, "__defaults__", (0.0,))
        fit_here("--recipe", tiny(), *SHORT, "--data.eval_batch_size=4")
        return capsys.readouterr().out

    log = lines()
    assert len(re.findall(r"^epoch 1/1  batch [12] of 2  loss \d\.\d+  [\d,]+ samples/s$", log, re.MULTILINE)) == 2
    assert re.search(r"^validating  batch 1 of \d+$", log, re.MULTILINE)
    assert re.search(r"^testing  batch 1 of \d+$", log, re.MULTILINE)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    terminal = lines()
    assert "  batch " not in terminal
    assert re.search(r"^epoch 1/1  loss", terminal, re.MULTILINE)


def test_loading_pretrained_weights_prints_nothing_of_its_own(tiny, fit_here, tmp_path, capfd):
    own = tmp_path / "own"
    AutoModel.from_config(AutoConfig.for_model(**BERT)).save_pretrained(own)
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "there", "a", "circle", "red"]))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(own)
    capfd.readouterr()
    text = f'--model.text={{"class_path": "fusion.encoders.TransformersText", "init_args": {{"name_or_path": "{own}", "config": null}}}}'
    fit_here("--recipe", tiny(), *SHORT, text)
    assert "Loading" not in "".join(capfd.readouterr())


# Runs without validation, and without a single update.


@pytest.mark.parametrize(
    "options",
    [NO_VALIDATION, [SELDOM], ["--trainer.fast_dev_run=true"]],
    ids=["limited", "later", "fast_dev_run"],
)
def test_a_run_without_validation_is_used_by_its_last_checkpoint_which_is_said(tiny, fit_here, options, capsys, tmp_path, write_manifest):
    run = fit_here("--recipe", tiny(), *SHORT, *options)
    assert "use it      " in capsys.readouterr().out
    assert not (run.folder / "checkpoints" / "best.ckpt").exists()
    assert evaluate(["--run", str(run.folder)]) == 0
    assert re.search("^note: .* has no best checkpoint", capsys.readouterr().out, re.MULTILINE)
    assert predict(["--run", str(run.folder), "--manifest", str(write_manifest()), "--out", str(tmp_path / "out.csv")]) == 0
    assert "has no best checkpoint" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="has no best checkpoint"):
        fusion.load(run.folder)
    assert predict(["--run", str(run.folder), "--manifest", str(write_manifest()), "--checkpoint=last", f"--out={tmp_path / 'o.csv'}"]) == 0
    assert "has no best checkpoint" not in capsys.readouterr().out


def test_a_run_without_an_update_says_that_it_cannot_be_used(tiny, fit_here, capsys):
    run = fit_here("--recipe", tiny(), "--trainer.max_epochs=0")
    told = capsys.readouterr().out
    assert "this model can't be used" in told
    assert "use it" not in told
    with pytest.raises(UserError, match="it has none"):
        fusion.load(run.folder)


# Upper bounds.


def test_an_upper_bound_is_printed_only_where_inputs_repeat(tiny, fit_here, write_manifest, capsys):
    run = fit_here("--recipe", tiny(), *SHORT)
    assert "upper bound (image only)" in capsys.readouterr().out
    assert {"ceiling_image", "ceiling_text", "ceiling_majority"} <= run.results()["test"].keys()
    unique = write_manifest(lambda i, row: dict(row, text=f"{row['text']} {i}"))
    run = fit_here("--recipe", tiny(manifest=unique), *SHORT)
    told = capsys.readouterr().out
    assert "upper bound (text only)" not in told
    assert "upper bound (image only)" in told
    assert "ceiling_text" not in run.results()["test"]
    fit_here("--recipe", tiny(), *SHORT, "--model.modalities=[text]")
    assert "upper bound (image only)" not in capsys.readouterr().out


@pytest.mark.parametrize("given", [EARLY.replace("+", ""), "--trainer.callbacks=RichProgressBar"])
def test_one_callback_alone_may_be_given(tiny, fit_here, given):
    monitor = ["--trainer.callbacks.monitor=val/loss"] if "Early" in given else []
    assert fit_here("--recipe", tiny(), *SHORT, given, *monitor).status == 0


def test_results_count_the_updates_that_were_made_not_those_of_the_best_epoch(tiny, fit_here):
    still = ["--model.optimizer.init_args.lr=0", "--trainer.max_epochs=3", "--trainer.limit_train_batches=2"]  # the first stays the best
    assert fit_here("--recipe", tiny(), *still).results()["updates"] == 6


# Whose mistake it is.


def test_a_bug_of_ours_keeps_its_traceback(tiny, monkeypatch):
    def broken(*_, **__):
        raise ValueError("too many values to unpack")

    monkeypatch.setattr(Classification, "learn", broken)
    with pytest.raises(ValueError, match="too many values") as caught:
        fit(["--recipe", str(tiny()), *SHORT])
    assert not isinstance(caught.value, UserError)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--model.optimizer.init_args.lr=-1", "Invalid learning rate"),
        ("--model.head.init_args.dim=0", "dim"),
        ('--data.augment=[{"class_path": "torchvision.transforms.v2.RandomHorizontalFlip", "init_args": {"p": 2}}]', "p"),
    ],
)
def test_what_a_class_rejects_in_its_constructor_is_the_users_mistake(tiny, tmp_path, option, words):
    with pytest.raises(UserError, match=words):
        fit(["--recipe", str(tiny()), *SHORT, option])


def test_a_package_that_is_missing_is_one_line(tiny, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress._RICH_AVAILABLE", False)
    with pytest.raises(UserError, match="rich"):
        fit(["--recipe", str(tiny()), *SHORT, "--trainer.callbacks+=RichProgressBar"])
