"""Runs that begin from a pruned model: smaller, rebuilt from plain data, trained and resumed like any other."""

import json
import re
import shutil
import threading

import numpy as np
import pytest
import tokenizers
import torch
import yaml
from tiny_world import BERT, SHORT, Run, assert_same_end
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import fusion
from fusion.cli.evaluate import evaluate
from fusion.cli.shrink import shrink
from fusion.cli.shrink_pruned import await_model
from fusion.console import printing
from fusion.deploy.exporting import export
from fusion.deploy.pruning import structured
from fusion.deploy.pruning.fine_tuning import fine_tune
from fusion.deploy.pruning.importance import importance_of
from fusion.deploy.pruning.sparse import sparsify, zero_smallest
from fusion.deploy.pruning.statistics import Moments
from fusion.deploy.pruning.structured import prune
from fusion.errors import UserError
from fusion.pruning.blocks import find_groups
from fusion.pruning.widths import narrow
from fusion.runs.bundle import read_bundle
from fusion.training.zeros import KeptZeros, matrices, packed, unpacked

WORDS = ["is", "there", "a", "red", "blue", "green", "circle", "square", "tri", "##angle", "##s", "what", "colour", "the", "zebra", "?"]
ALL_BATCHES = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1.0"]  # which SHORT limits
HEAD = {("head", "feed-forward units")}  # between Concat's two layers
VOCABULARY = ["[PAD]", "[unused]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefgh")]


TRAINED = []  # one run for all tests, which only read it


@pytest.fixture
def run(tiny, fit_here):
    if not TRAINED:
        TRAINED.append(fit_here("--recipe", tiny(dropout=0.2), *SHORT))
    return TRAINED[0]


@pytest.fixture
def asked(shapes_rows):
    folder, rows = shapes_rows
    return {"images": [str(folder / row["image"]) for row in rows[:4]] + [None], "texts": [row["text"] for row in rows[:3]] + [None, "is"]}


@pytest.fixture
def text_folder(tmp_path):
    """A folder with a BERT and its WordPiece tokenizer."""
    torch.manual_seed(0)
    config = BertConfig(**{key: value for key, value in BERT.items() if key != "model_type"} | {"vocab_size": len(VOCABULARY)})
    BertModel(config).save_pretrained(tmp_path / "text")
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    backend = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(tmp_path / "text")
    return tmp_path / "text"


def count(folder):
    return sum(p.numel() for p in fusion.load(folder).model.parameters())


def recipe_of(folder):
    return yaml.safe_load((folder / "recipe.yaml").read_text())


# Structured


def test_a_pruned_run_is_an_ordinary_run_of_half_the_parameters(run, asked, tmp_path, capsys):
    pruned = prune(run.folder, tmp_path / "start", times=1.6, samples=16)
    before, after = pruned.parameters
    assert (before, after) == (count(run.folder), count(tmp_path / "start"))
    assert after <= before / 1.6
    assert pruned.bytes[1] == pytest.approx((tmp_path / "start/model/model.safetensors").stat().st_size, rel=0.1)
    kinds = {(one.part, one.kind) for one in pruned.removed}
    assert kinds == {(part, kind) for part in ("image", "text") for kind in ("feed-forward units", "attention heads")} | HEAD
    assert all(one.after < one.before for one in pruned.removed if one.before > 2)
    assert pruned.untouched == {}
    assert evaluate(["--run", str(tmp_path / "start"), "--split", "val"]) == 0  # before training

    with printing():
        assert fine_tune(tmp_path / "start", tmp_path / "small", epochs=1) == 0
    tuned = Run(0, tmp_path / "small")
    assert tuned.results()["test"]["accuracy"] > 0
    own = recipe_of(tuned.folder)["model"]["pruned"]
    assert own == json.loads((tuned.folder / "model/model.json").read_text())["pruned"]
    assert count(tuned.folder) == after
    printed = capsys.readouterr().out
    weights = len(read_bundle(tmp_path / "start/model")[1])
    assert f"{weights} of {weights} weights" in printed
    moved = [name for name, value in read_bundle(tmp_path / "start/model")[1].items() if not same(value, tuned, name)]
    assert len(moved) > weights / 2  # it was trained
    # As any other run:
    expected = fusion.load(tuned.folder).predict(**asked).values
    assert np.array_equal(fusion.load(tuned.folder / "checkpoints/best.ckpt").predict(**asked).values, expected)
    package = export(tuned.folder, "onnx", tmp_path / "package")
    assert np.abs(fusion.load(package.folder).predict(**asked).values - expected).max() < 1e-5
    assert fusion.Run(tuned.folder).evaluate()["all"]["accuracy"] == pytest.approx(tuned.results()["test"]["accuracy"])


def same(value, run, name):
    return torch.equal(value, read_bundle(run.folder / "model")[1][name])


def test_training_of_a_pruned_run_resumes_to_the_bit(run, tmp_path, assert_resumes_to_the_bit):
    prune(run.folder, tmp_path / "start", keep=0.5, samples=8)
    assert_resumes_to_the_bit("--config", tmp_path / "start/recipe.yaml", f"--init_from={tmp_path / 'start'}", *ALL_BATCHES)


def test_a_pruned_run_is_pruned_again(run, tmp_path):
    first = prune(run.folder, tmp_path / "first", keep=0.5, samples=8)
    second = prune(tmp_path / "first", tmp_path / "second", keep=0.5, samples=8, skip=["text"])
    assert second.parameters[0] == first.parameters[1]
    assert second.parameters[1] == count(tmp_path / "second") < first.parameters[1]
    earlier, later = (recipe_of(tmp_path / name)["model"]["pruned"] for name in ("first", "second"))
    assert earlier.keys() <= later.keys()
    assert {name: n for name, n in earlier.items() if name.startswith("text")} == {n: c for n, c in later.items() if n.startswith("text")}


def test_what_is_skipped_stays(run, tmp_path):
    pruned = prune(run.folder, tmp_path / "start", keep=0.5, samples=8, skip=["image", "head", "text.*attention*"])
    kept = {(one.part, one.kind): one.before == one.after for one in pruned.removed}
    assert [name for name, stays in kept.items() if not stays] == [("text", "feed-forward units")]


def test_the_means_come_from_samples_without_padding(run, tmp_path, monkeypatch):
    seen = []

    def watch(model, layers, batches, whole=structured.input_moments):
        batches = list(batches)
        seen.extend(batches)
        return whole(model, layers, batches)

    monkeypatch.setattr(structured, "input_moments", watch)
    prune(run.folder, tmp_path / "start", keep=0.5, samples=5)
    assert len(seen) == 5
    assert all(bool(batch["text"].mask.all()) and len(batch["text"].mask) == 1 for batch in seen)
    assert all(bool(batch["image"].present.all()) for batch in seen)


def test_importance_by_variance_is_the_error_of_replacing_a_unit_by_its_mean(run):
    model = fusion.load(run.folder).model
    group = next(group for name, group in find_groups(model).items() if name == "text.body.encoder.layer.0.intermediate.dense")
    layer = group.consumers[0].layer
    x, moments = torch.randn(50, layer.in_features) + 1, Moments()
    moments.add(x)
    found = importance_of(group, moments, "variance")
    for unit in (0, 7):
        replaced = x.clone()
        replaced[:, unit] = x[:, unit].mean()
        error = (layer(x) - layer(replaced)).detach().double().square().sum(1).mean()
        assert found[unit] == pytest.approx(float(error), rel=1e-4)


def test_importance_by_magnitude_is_the_product_of_the_norms_of_the_weights(run):
    groups = find_groups(fusion.load(run.folder).model)
    first = groups["text.body.encoder.layer.0.intermediate.dense"]
    made, read = first.producers[0].layer.weight.double(), first.consumers[0].layer.weight.double()
    expected = made.norm(dim=1) * read.norm(dim=0)
    assert torch.allclose(importance_of(first, Moments(), "magnitude"), expected)
    heads = groups["image.body.blocks.0.attn.qkv"]
    value, out = heads.producers[0].layer.weight.double().chunk(3)[2], heads.consumers[0].layer.weight.double()
    frobenius = [
        value[h * heads.size :][: heads.size].norm() * out[:, h * heads.size :][:, : heads.size].norm() for h in range(heads.units)
    ]
    assert torch.allclose(importance_of(heads, Moments(), "magnitude"), torch.stack(frobenius))


def test_a_model_of_classes_in_another_order_starts_from_a_pruned_one_by_name(run, tmp_path, write_manifest, fit_here, tiny, capsys):
    prune(run.folder, tmp_path / "start", keep=0.5, samples=8)

    def renamed(i, row):
        return row | {"label": {"yes": "aye"}.get(row["label"], row["label"])}

    recipe = tiny(manifest=write_manifest(renamed), name="other")
    widths = json.dumps(recipe_of(tmp_path / "start")["model"]["pruned"])
    fit_here("--recipe", recipe, f"--model.pruned={widths}", f"--init_from={tmp_path / 'start'}", *SHORT, runs="other")
    printed = capsys.readouterr().out
    assert "classes are loaded by name; 1 newly initialised: aye" in printed
    assert "not separable" not in printed
    assert "of another shape" not in printed


# The command


def test_the_command_prunes_trains_and_compares(run, tmp_path, capsys):
    out = tmp_path / "small"
    words = ["--run", str(run.folder), "--method", "prune", "--out", str(out), "--keep=0.5", "--calibration_samples=8", "--epochs=1"]
    assert shrink([*words, "--seconds=0.05", "--rate=0.1", "--data.batch_size", "8"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"text: +feed-forward units +64 +to 32", printed)
    assert "times fewer" in printed
    report = json.loads((out / "shrink.json").read_text())
    before, untrained, after = report["models"].values()
    assert before["bytes"] > 1.3 * after["bytes"] > 1.2 * untrained["bytes"]
    assert after["scores"]["test"][0] == pytest.approx(Run(0, out).results()["test"]["accuracy"], abs=1e-6)
    assert before["scores"]["test"][0] == pytest.approx(run.results()["test"]["accuracy"], abs=1e-6)
    assert report["method"] == "prune"
    settings = recipe_of(out)
    assert settings["model"]["optimizer"]["init_args"]["lr"] == pytest.approx(0.005)
    assert (settings["data"]["batch_size"], settings["trainer"]["max_epochs"]) == (8, 1)
    assert settings["init_from"] == str(out / "start")


def test_the_command_makes_a_sparse_run_and_says_that_it_is_no_faster(run, tmp_path, capsys):
    words = ["--run", str(run.folder), "--method=sparse", "--out", str(tmp_path / "s"), "--share=0.75", "--epochs=1", "--seconds=0.05"]
    assert shrink(words) == 0
    assert "This makes nothing faster by itself, and the file no smaller" in capsys.readouterr().out
    report = json.loads((tmp_path / "s/shrink.json").read_text())
    weights = matrices(fusion.load(tmp_path / "s").model).values()
    assert sum(zeros for _, zeros in report["zeros"].values()) == sum(int((weight == 0).sum()) for weight in weights)


def test_the_command_without_training_writes_a_run_that_evaluate_takes(run, tmp_path, capsys):
    out = tmp_path / "small"
    assert shrink(["--run", str(run.folder), "--method=prune", "--out", str(out), "--epochs=0", "--seconds=0.05"]) == 0
    assert list(json.loads((out / "shrink.json").read_text())["models"]) == ["before", "after"]
    assert evaluate(["--run", str(out)]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs=-1"], "--epochs is -1; expected at least 1, or 0"),
        (["--epochs=0", "--data.batch_size=8"], "nothing is trained; leave out --data.batch_size"),
        (["--rate=0"], "--rate is 0; expected a number above 0"),
        (["--kep=0.5"], "unknown option --kep. Did you mean keep"),
        (["--share=0.5"], "unknown option --share"),  # of another method
        (["--keep=2"], "--keep is 2; expected a ratio above 0"),
        (["--model.heda=Gated", "--keep=0.5"], "unknown key 'model.heda'|unknown option --model.heda"),
    ],
)
def test_mistakes_in_the_commands_options_are_rejected_in_one_line(run, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        shrink(["--run", str(run.folder), "--method=prune", "--out", str(tmp_path / "small"), *words])
    assert not (tmp_path / "small").exists()


# Vocabulary


def test_the_vocabulary_is_trimmed_to_that_of_train_and_training_texts_are_answered_as_before(
    tiny, fit_here, text_folder, asked, tmp_path, capsys
):
    text = [f"--model.text.init_args.name_or_path={text_folder}", "--model.text.init_args.config=null"]
    run = fit_here("--recipe", tiny(), *text, *SHORT)
    pruned = prune(run.folder, tmp_path / "start", keep=1.0, samples=8)
    (tokens,) = [one for one in pruned.removed if one.kind == "tokens"]
    loaded, full = fusion.load(tmp_path / "start"), fusion.load(run.folder)
    own = loaded.processor.inputs["text"].tokenizer.backend.get_vocab()
    assert (tokens.before, tokens.after) == (len(VOCABULARY), len(own))
    assert "zebra" not in own  # in no training text
    assert {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "circle", "z", "##a"} <= own.keys()
    assert np.array_equal(loaded.predict(**asked).values, full.predict(**asked).values)
    assert np.isfinite(loaded.predict(texts=["zebra"]).values).all()
    with printing():
        assert fine_tune(tmp_path / "start", tmp_path / "small", epochs=1, options=["--trainer.limit_train_batches=2"]) == 0
    weights = len(read_bundle(tmp_path / "start/model")[1])
    printed = capsys.readouterr().out
    assert f"{weights} of {weights} weights" in printed
    assert "newly initialised" not in printed  # the same tokens, in the same order
    assert fusion.load(tmp_path / "small").processor.inputs["text"].tokenizer.backend.get_vocab() == own
    again = prune(tmp_path / "small", tmp_path / "again", keep=0.5, samples=8)
    assert [one for one in again.removed if one.kind == "tokens"] == []


@pytest.mark.slow
def test_the_vocabulary_stays_where_that_is_asked(tiny, fit_here, text_folder, tmp_path):
    text = [f"--model.text.init_args.name_or_path={text_folder}", "--model.text.init_args.config=null"]
    run = fit_here("--recipe", tiny(), *text, *SHORT)
    pruned = prune(run.folder, tmp_path / "start", keep=0.5, samples=8, vocabulary=False)
    assert [one for one in pruned.removed if one.kind == "tokens"] == []


# Sparse


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_weights_that_are_set_to_zero_stay_zero_in_training(run, tmp_path, accumulate):
    sparse = sparsify(run.folder, tmp_path / "start", share=0.6)
    (total, zeros) = (sum(numbers) for numbers in zip(*sparse.by_part.values(), strict=True))
    assert zeros == round(0.6 * total)
    start = matrices(fusion.load(tmp_path / "start").model)
    options = [ALL_BATCHES[1], f"--trainer.accumulate_grad_batches={accumulate}", "--model.optimizer.init_args.weight_decay=0.1"]
    assert fine_tune(tmp_path / "start", tmp_path / "small", epochs=1, options=options) == 0
    end = matrices(fusion.load(tmp_path / "small").model)
    assert all(bool((end[name][weight == 0] == 0).all()) for name, weight in start.items())
    assert sum(int((weight == 0).sum()) for weight in end.values()) == zeros  # the others are trained
    moved = sum(int((end[name] != weight).sum()) for name, weight in start.items())
    assert moved > 0.5 * (total - zeros)
    assert recipe_of(tmp_path / "small")["model"]["keep_zeros"] is True


def test_training_of_a_sparse_run_resumes_to_the_bit(run, tmp_path, assert_resumes_to_the_bit):
    sparsify(run.folder, tmp_path / "start", share=0.5)
    assert_resumes_to_the_bit("--config", tmp_path / "start/recipe.yaml", f"--init_from={tmp_path / 'start'}", *ALL_BATCHES)


def test_a_weight_that_is_zero_by_chance_when_a_run_is_resumed_is_trained_on():
    layer = torch.nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.fill_(1.0)[0, 0] = 0.0
    first = KeptZeros()
    first.begin(torch.nn.Sequential(layer))
    with torch.no_grad():
        layer.weight[1, 1] = 0.0
    resumed = KeptZeros()
    resumed.load(first.state())
    resumed.begin(torch.nn.Sequential(layer))
    with torch.no_grad():
        layer.weight.fill_(2.0)
    resumed.apply()
    assert layer.weight.tolist() == [[0.0, 2.0, 2.0], [2.0, 2.0, 2.0]]


def test_zeros_are_kept_where_a_scaler_skips_updates(run, tmp_path):
    sparsify(run.folder, tmp_path / "start", share=0.5)
    start = matrices(fusion.load(tmp_path / "start").model)
    plugin = '--trainer.plugins={"class_path": "fusion.training.Fp16", "init_args": {"init_scale": 1e6}}'
    assert fine_tune(tmp_path / "start", tmp_path / "small", epochs=1, options=[plugin, ALL_BATCHES[1]]) == 0
    state = Run(0, tmp_path / "small").checkpoint()["fusion"]
    assert state["skipped"] > 0
    assert state["updates"] > 0
    end = matrices(fusion.load(tmp_path / "small").model)
    assert all(torch.equal(end[name] == 0, weight == 0) for name, weight in start.items())


def test_masks_are_packed_to_bits_and_back():
    torch.manual_seed(0)
    for shape in ((3, 5), (4, 2, 3, 3), (8,), (1, 1)):
        mask = torch.rand(shape) < 0.5
        assert len(packed(mask)) == -(-mask.numel() // 8)
        assert torch.equal(unpacked(packed(mask), torch.empty(shape)), mask)


def test_the_smallest_weights_of_all_layers_together_become_zero():
    torch.manual_seed(0)
    weights = [torch.randn(4, 5), torch.randn(10, 10) * 3]
    magnitudes = torch.cat([w.abs().flatten() for w in weights])
    zero_smallest(weights, 0.25)
    after = torch.cat([w.flatten() for w in weights])
    assert int((after == 0).sum()) == 30
    assert magnitudes[after == 0].max() < magnitudes[after != 0].min()


# Invalid input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "--keep is 0; expected a ratio above 0, at most 1"),
        ({"keep": 1.5}, "--keep is 1.5"),
        ({"times": 1.0}, "--times is 1; expected a number above 1"),
        ({"keep": 0.5, "times": 2.0}, "either --keep .* or --times"),
        ({"times": 500.0}, "--times: .* still has .* parameters"),
        ({"by": "luck"}, "--by is luck; expected variance or magnitude"),
        ({"samples": 0}, "--calibration_samples is 0"),
        ({"keep": 1.0}, "no unit would be removed"),
        ({"skip": ["txt"]}, "--skip: nothing that could be removed matches 'txt'"),
        ({"skip": ["image", "text", "head"]}, "nothing to remove"),
    ],
)
def test_options_of_pruning_that_make_no_sense_are_rejected_and_nothing_is_written(run, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        prune(run.folder, tmp_path / "start", **options)
    assert not (tmp_path / "start").exists()


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan")])
def test_a_share_of_zeros_out_of_range_is_rejected(run, tmp_path, share):
    with pytest.raises(UserError, match=r"--share is .*; expected a share above 0 and below 1"):
        sparsify(run.folder, tmp_path / "start", share=share)


def test_runs_that_cannot_be_pruned_are_rejected_in_one_line(run, tiny, fit_here, tmp_path):
    with pytest.raises(UserError, match="there is no run"):
        prune(tmp_path / "none", tmp_path / "start")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no recipe.yaml"):
        prune(tmp_path / "empty", tmp_path / "start")
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped/recipe.yaml").write_text((run.folder / "recipe.yaml").read_text())
    with pytest.raises(UserError, match="has no checkpoint 'best'"):
        prune(tmp_path / "stopped", tmp_path / "start")
    with pytest.raises(UserError, match="exists already; expected a new folder"):
        prune(run.folder, run.folder)
    adapters = '--model.adapters={"text": {"target_modules": ["query"]}}'
    adapted = fit_here("--recipe", tiny(), *SHORT, adapters, runs="adapted")
    with pytest.raises(UserError, match="has adapters, whose weights begin at zero"):
        sparsify(adapted.folder, tmp_path / "start")
    assert prune(adapted.folder, tmp_path / "start", keep=0.5, samples=4).untouched["text"].endswith("has adapters")


def test_keeping_zeros_is_rejected_where_there_are_none_or_adapters_begin_with_them(tiny, fit_here):
    with pytest.raises(UserError, match=r"keep_zeros: no weight is zero; start from a sparse model: --init_from=RUN"):
        fit_here("--recipe", tiny(), *SHORT, "--model.keep_zeros=true")
    adapters = '--model.adapters={"text": {"target_modules": ["query"]}}'
    with pytest.raises(UserError, match=r"keep_zeros and model.adapters"):
        fit_here("--recipe", tiny(), *SHORT, "--model.keep_zeros=true", adapters)


def test_a_pruned_models_folder_with_other_widths_is_rejected(run, tmp_path):
    prune(run.folder, tmp_path / "start", keep=0.5, samples=4)
    path = tmp_path / "start/model/model.json"
    about = json.loads(path.read_text())
    about["pruned"] = dict.fromkeys(about["pruned"], 9999)
    path.write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"is 9999; expected a number of .* from 1 to"):
        fusion.load(tmp_path / "start")


def test_widths_are_removed_before_the_model_is_trained_from_scratch_too(tiny, fit_here, run):
    name = "text.body.encoder.layer.0.intermediate.dense"
    small = fit_here("--recipe", tiny(), *SHORT, f'--model.pruned={{"{name}": 16}}', runs="small")
    groups = find_groups(fusion.load(small.folder).model)
    assert groups[name].units == 16
    whole = fusion.load(run.folder).model
    narrow(whole, {name: 16})
    assert {n: p.shape for n, p in whole.named_parameters()} == {n: p.shape for n, p in fusion.load(small.folder).model.named_parameters()}


@pytest.mark.slow
def test_the_same_pruning_twice_gives_the_same_run(run, tmp_path):
    for name in ("a", "b"):
        prune(run.folder, tmp_path / name / "start", keep=0.5, samples=8)
        assert fine_tune(tmp_path / name / "start", tmp_path / name / "run", epochs=1, options=["--trainer.limit_train_batches=2"]) == 0
    assert_same_end(Run(0, tmp_path / "a/run"), Run(0, tmp_path / "b/run"))


def test_the_other_ranks_wait_for_the_model_that_training_starts_from(tmp_path, run):
    with pytest.raises(UserError, match=r"the first rank has not written .*start within 0.1 s"):
        await_model(tmp_path / "start", timeout_s=0.1)
    writing = threading.Timer(0.5, shutil.copytree, [run.folder, tmp_path / "start"])
    writing.start()
    await_model(tmp_path / "start", timeout_s=30)
    writing.join()


def test_only_the_first_rank_makes_and_compares_a_model_that_is_not_trained(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fusion.cli.shrink_pruned.is_rank_zero", lambda: False)
    assert shrink([f"--run={run.folder}", "--method=prune", f"--out={tmp_path / 'out'}", "--epochs=0", "--keep=0.5"]) == 0
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().out == ""


def test_without_validation_and_test_samples_there_is_no_table_and_that_is_said(tiny, fit_here, tmp_path, capsys):
    source = fit_here(
        "--recipe", tiny(), *SHORT, "--data.columns.split=null", "--data.val=0", "--data.test=0", "--trainer.limit_val_batches=0"
    )
    assert shrink([f"--run={source.folder}", "--method=prune", f"--out={tmp_path / 'out'}", "--epochs=0", "--keep=0.5"]) == 0
    assert "there is no table of latency and scores: the run has neither validation nor test samples" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "shrink.json").read_text())["models"] == {}
