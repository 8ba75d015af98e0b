"""Runs with mixup and CutMix: reported, resumed, over ranks, for every task, beside other options; and what is rejected."""

import numpy as np
import pytest
import torch
from slow_cases import slow_except
from tiny_world import BERT, NO_VALIDATION, SHORT
from torch.nn.functional import cross_entropy

from fusion.encoders import TransformersText
from fusion.encoders.base import Encoder
from fusion.errors import UserError
from fusion.model import FusionModel
from fusion.session import fit
from fusion.tasks import Classification
from fusion.training import OGMGE, Engine, Mixing
from fusion.training.mixing import Mixer

WEIGHT = 0.3
ON = "--model.mixing.mixup=0.4"
BOTH = [ON, "--model.mixing.cutmix=1.0"]


def always(monkeypatch):
    """Every training batch gets mixup with WEIGHT; gives the batches before and after."""
    pairs, usual = [], Mixer.mix

    def watched(self, batch):
        pairs.append((batch, usual(self, batch)))
        return pairs[-1][1]

    monkeypatch.setattr(Mixer, "draw", lambda *_: (False, WEIGHT, None))
    monkeypatch.setattr(Mixer, "mix", watched)
    return pairs


def test_a_run_reports_how_often_and_how_much_it_mixed(tiny, fit_here, capsys):
    run = fit_here("--recipe", tiny(), *BOTH, "--model.mixing.probability=0.8")
    printed, found = capsys.readouterr().out, run.results()["mixing"]
    assert "mixing: mixup (Beta 0.4) or CutMix (Beta 1) of 80% of the batches" in printed
    assert found["samples"] == 2 * 8 * 16
    share, weight = (np.array(run.column(f"train/{name}_step")) for name in ("mixed_share", "mixed_weight"))
    assert 0.4 < found["mixed"] < 1
    assert found["mixed"] == pytest.approx(share.mean(), abs=1e-6)
    assert found["mixed"] == pytest.approx(found["mixup"] + found["cutmix"])
    assert min(found["mixup"], found["cutmix"]) > 0
    assert found["lesser_weight"] == pytest.approx(weight.sum() / share.sum(), abs=1e-5)
    assert run.column("train/mixed_share_epoch") == pytest.approx([share[:8].mean(), share[8:].mean()])
    line = f"mixing      {found['mixed']:.1%} of 256 training samples (mixup {found['mixup']:.1%}, CutMix {found['cutmix']:.1%})"
    assert f"{line}, the lesser of both with a mean weight of {found['lesser_weight']:.3f}\n" in printed


def test_a_batch_that_is_not_mixed_trains_as_without_the_option(tiny, fit_here):
    without = fit_here("--recipe", tiny(), runs="without")
    never = fit_here("--recipe", tiny(), ON, "--model.mixing.probability=1e-12", runs="never")
    assert without.column("train/loss_step") == never.column("train/loss_step")
    assert without.results() == {key: value for key, value in never.results().items() if key != "mixing"}
    assert never.results()["mixing"] == {"samples": 256, "mixed": 0, "mixup": 0, "cutmix": 0, "lesser_weight": 0}
    assert not without.column("train/mixed_share_step")


TASKS = {"MultiLabel": "{}", "Ordinal": "{}", "Regression": "{}", "Classification": "{class_weights: balanced, label_smoothing: 0.1}"}


@pytest.mark.parametrize("task", slow_except(TASKS, "MultiLabel"))
def test_samples_of_every_task_are_mixed(tiny, write_manifest, fit_here, task):
    manifest = write_manifest(lambda i, row: row | {"label": str(len(row["text"]) % 3)})
    whole = ["--recipe", tiny(manifest=manifest), f"--model.task={{class_path: {task}, init_args: {TASKS[task]}}}", *SHORT]
    run, without = fit_here(*whole, *BOTH, runs="mixed"), fit_here(*whole, runs="without")
    assert run.results()["mixing"]["mixed"] == 1
    assert run.column("train/loss_step")[0] != without.column("train/loss_step")[0]


def test_each_modalitys_own_loss_and_confidence_are_of_mixed_targets(parts, monkeypatch):
    model, data, trainer = parts(ON, "--model.balance=OGMGE", "--trainer.max_steps=1", *NO_VALIDATION)
    seen, outputs, observed = always(monkeypatch), [], []
    forward, observe = FusionModel.forward, OGMGE.observe
    monkeypatch.setattr(FusionModel, "forward", lambda *given: outputs.append(forward(*given)) or outputs[-1])
    monkeypatch.setattr(OGMGE, "observe", lambda self, engine, *given: observed.append(given) or observe(self, engine, *given))
    trainer.fit(model, datamodule=data)
    batch, (alone, scores) = seen[0][1], observed[0]
    classes = torch.nn.functional.one_hot(batch.target, model.task.out_dim).float()
    target = WEIGHT * classes + (1 - WEIGHT) * classes[batch.mixture.partner]
    for name, output in outputs[0].by_modality.items():
        assert torch.allclose(alone[name], cross_entropy(output, target), atol=1e-6)
        assert torch.allclose(scores[name], (output.softmax(dim=1) * target).sum(dim=1), atol=1e-6)


def test_evaluation_is_not_mixed(parts, monkeypatch):
    model, data, trainer = parts(ON, "--trainer.max_epochs=1")
    seen = always(monkeypatch)
    trainer.fit(model, datamodule=data)
    assert len(seen) == trainer.num_training_batches == 8


FP16 = ["--recipe=engine/amp", "--trainer.accelerator=cpu"]
COMBINED = {
    "accumulated, balanced, without some modalities": [
        "--trainer.accumulate_grad_batches=2",
        "--model.balance=OGMGE",
        "--model.modality_dropout=0.2",
    ],
    "fp16": FP16,
    "curriculum": ["--data.curriculum.by=loss"],
    "frozen and adapted text": ['--model.adapters={"text": {"r": 2, "target_modules": ["query"]}}'],
}


@pytest.mark.parametrize(
    "options", [pytest.param(o, id=name, marks=[] if name == "fp16" else pytest.mark.slow) for name, o in COMBINED.items()]
)
def test_a_run_that_was_interrupted_ends_as_an_undisturbed_one_with_the_same_report(tiny, assert_resumes_to_the_bit, options):
    assert_resumes_to_the_bit("--recipe", tiny(dropout=0.2), *BOTH, *options)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["engine/ddp", "engine/fsdp"])
def test_two_ranks_report_the_samples_of_both(tiny, fit_on_two, engine):
    ranks = ["--recipe", engine, "--trainer.accelerator=cpu", "--trainer.devices=2"]
    run, printed = fit_on_two(tiny(), *BOTH, engine=ranks)
    found = run.results()["mixing"]
    share = np.array(run.column("train/mixed_share_step"))
    assert found["samples"] == 256
    assert set(share) - {0, 1} <= {0.5}  # each rank draws for its own half
    assert found["mixed"] == pytest.approx(share.mean(), abs=1e-6)
    assert printed.count("mixing      ") == 1


@pytest.mark.slow
def test_a_resumed_run_of_two_ranks_reports_all_its_samples_once(tiny, fit_on_two):
    constant = "--model.schedule=Constant"  # whose rates don't depend on the number of epochs
    whole, _ = fit_on_two(tiny(), *BOTH, constant, runs="whole")
    half, _ = fit_on_two(tiny(), *BOTH, constant, "--trainer.max_epochs=1", runs="half")
    assert half.results()["mixing"]["samples"] == 128
    resumed, _ = fit_on_two(half.folder, "--trainer.max_epochs=2", runs="half")
    assert resumed.results()["mixing"] == whole.results()["mixing"]


@pytest.mark.slow
def test_a_compiled_model_mixes_alike(tiny, fit_here):
    short = [*BOTH, *SHORT, *NO_VALIDATION, "--trainer.limit_test_batches=0", '--model.image.init_args.options={"depth": 1}']
    plain, compiled = (fit_here("--recipe", tiny(), *short, f"--model.compile={on}", runs=on) for on in ("false", "true"))
    assert compiled.column("train/loss_step") == pytest.approx(plain.column("train/loss_step"), abs=1e-5)


# Rejected


class Unmixable(Classification):
    """Classification whose loss depends on other samples."""

    mixable = False


def test_a_task_whose_target_cannot_be_mixed_is_rejected():
    with pytest.raises(UserError, match=r"model\.mixing: the target of model\.task=Unmixable can't be mixed; leave out model\.mixing, or"):
        Engine(image=lambda: None, text=lambda: None, task=Unmixable(), mixing=Mixing(mixup=0.2))


class Own(TransformersText):
    """An encoder of texts that doesn't know of mixtures."""

    check_mixing = Encoder.check_mixing


def test_an_encoder_that_may_not_mix_its_input_is_rejected(parts):
    model, data, _ = parts(ON)
    model.factories["text"] = lambda: Own(config=BERT)
    with pytest.raises(UserError, match=r"model\.mixing: 'text': a Own can't encode mixed samples; leave out model\.mixing"):
        model.build(data)


CLIP = {key: BERT[key] for key in BERT if "prob" not in key} | {"model_type": "clip_text_model"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.mixing.probability=0.5"], "mixup and cutmix are both 0; give one of them"),
        ([ON, "--model.mixing.cutmix=-1"], "cutmix is -1.0; expected a number of at least 0"),
        ([ON, "--model.mixing.probability=0"], "probability is 0.0; expected a probability above 0"),
        ([ON, "--model.mixing.cutmix_share=0.5"], "cutmix_share is an option of mixup and cutmix together"),
        ([*BOTH, "--model.mixing.cutmix_share=1"], "cutmix_share is 1.0; expected a share between 0 and 1"),
        (["--model.mixing.mixups=1"], "mixups"),
        (
            ["--model.mixing.cutmix=1", "--model.modalities=[text]"],
            "cutmix cuts images, but the inputs are text; leave it out and use mixup",
        ),
        (
            [ON, f"--model.text.init_args.config={CLIP}"],
            "model.mixing: 'text': text encoder: a clip_text_model can't encode mixed word embeddings",
        ),
    ],
)
def test_options_that_cannot_be_meant_are_rejected_before_training(tiny, options, message):
    with pytest.raises(UserError) as error:
        fit(["--recipe", str(tiny()), *options, *SHORT])
    assert message in str(error.value)
