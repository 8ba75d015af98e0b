"""A model that learns from a teacher: what it is given, what its loss is, and runs resumed, over ranks, and without the teacher."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from host_waits import CountReads
from PIL import Image
from tiny_world import BERT, NO_VALIDATION, ROUNDING, SHORT, furthest_weights, rows_and_predictions

import fusion
import fusion.session as command
from fusion.data.kinds import ImageInput
from fusion.encoders import TimmImage
from fusion.errors import UserError
from fusion.heads import FusionOutput
from fusion.inputs import Mixture
from fusion.predictor import Predictor
from fusion.processing.images import ImageSpec
from fusion.session import fit
from fusion.settings.parser import FusionCLI
from fusion.tasks import Classification, MultiLabel, MultiTask, Ordinal, Regression, SubTask
from fusion.training import Engine, Teacher, distillation, teacher_outputs
from fusion.training.distillation import Distillation
from fusion.training.teacher_checks import trained_on

FEATURES = '--model.teacher.features={"text": 0.5, "image": 0.1, "fused": 1}'
WORDS = {**BERT, "hidden_size": 16, "vocab_size": 90}
TRAINED = {}


@pytest.fixture
def teacher(tiny, fit_here):
    """A run of another tokenizer, image size and width than the students', trained once for all tests."""
    if "run" not in TRAINED:
        unlike = ["--model.image.image_size=48", f"--model.text.config={json.dumps(WORDS)}", "--model.head.dim=24"]
        TRAINED["run"] = fit_here("--recipe", tiny(), *unlike, "--model.optimizer.lr=0.1", "--seed_everything=3", runs="teacher")
    return TRAINED["run"].folder


def of(*runs):
    return f"--model.teacher.runs=[{', '.join(map(str, runs))}]" if len(runs) > 1 else f"--model.teacher.runs={runs[0]}"


def given(parts, *options, **how):
    """(engine, data) of a student that has asked its teacher."""
    model, data, _ = parts(*options, **how)
    model.build(data)
    model.ask_teacher(data)
    return model, data


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


# What the teacher gives


def without_some(i, row):
    return row | {"image": "" if i % 5 == 0 else row["image"], "text": "" if i % 5 == 1 else row["text"]}


def test_each_sample_gets_what_the_teacher_predicts_for_it_from_the_manifest(parts, write_manifest, teacher):
    hot = "--model.teacher.temperature=3"
    model, data = given(parts, of(teacher), hot, FEATURES, manifest=write_manifest(without_some))
    split = data.splits["train"]
    asked = Predictor.load(teacher)
    found = asked.predict(list(split.table.inputs["image"]), list(split.table.inputs["text"]))
    batch = split.samples.__getitems__(next(iter(data.train_dataloader().batch_sampler)))
    rows = batch.sample.numpy()
    q = softmax(np.log(found.values.astype(np.float64)) / 3)[rows]
    np.testing.assert_allclose(batch.teacher["outputs"].numpy(), q, atol=1e-5)
    assert model.task.names == asked.processor.task.names
    assert np.ptp(q, axis=0).max() > 0.01  # they differ from sample to sample
    for name in ("image", "text"):
        lacks = batch.teacher[name].isnan().all(dim=1).numpy()
        assert (lacks == ~found.present[name][rows]).all()
        every = split.samples.teacher[name]
        assert np.nanmean(every, axis=0) == pytest.approx(0, abs=1e-5)
        assert np.nanstd(every, axis=0) == pytest.approx(1, abs=1e-4)
    assert batch.teacher["text"].shape[1] == 16
    assert model.distillation.maps["text"].weight.shape == (16, 32)
    assert model.distillation.maps["fused"].weight.shape == (24, 32)
    assert split.samples.unaugmented().teacher is None


def test_features_are_those_of_each_sample_whether_or_not_it_shares_its_image(parts, teacher):
    _, data = given(parts, of(teacher), FEATURES)
    split, asked = data.splits["train"], Predictor.load(teacher)
    asked.model.report_features(["image", "text", "fused"])
    one_by_one = []
    with torch.inference_mode():
        for image, text in zip(split.table.inputs["image"], split.table.inputs["text"], strict=True):
            inputs = {name: asked.processor.inputs[name].batch([cell], {}) for name, cell in (("image", image), ("text", text))}
            one_by_one.append(asked.model(inputs).features)
    for name in ("image", "text", "fused"):
        every = torch.cat([features[name] for features in one_by_one]).double()
        assert split.samples.blocks().max() + 1 < len(every)  # images are shared
        expected = (every - every.mean(dim=0)) / every.std(dim=0, correction=0)
        np.testing.assert_allclose(split.samples.teacher[name], expected, atol=2e-2)


def test_the_probabilities_of_an_ensemble_are_averaged_and_more_classes_than_the_students_left_out(
    tiny, parts, write_manifest, fit_here, teacher
):
    more = write_manifest(lambda i, row: row | {"label": "black" if i % 9 == 0 else row["label"]})  # first of the classes by name
    other = fit_here("--recipe", tiny(manifest=more), *SHORT, runs="other").folder
    model, data = given(parts, of(teacher, other), "--model.teacher.temperature=1", manifest=write_manifest())
    table = data.splits["train"].table
    each = [Predictor.load(run).predict(list(table.inputs["image"]), list(table.inputs["text"])) for run in (teacher, other)]
    assert each[1].names == ["black", *each[0].names]
    known = each[1].values[:, 1:] / each[1].values[:, 1:].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(data.splits["train"].samples.teacher["outputs"], (each[0].values + known) / 2, atol=1e-5)
    assert len(model.distillation.digests) == 2


def test_the_teacher_is_asked_once_for_the_same_model_and_samples(tiny, parts, teacher, tmp_path, monkeypatch):
    asked, compute = [], teacher_outputs.compute
    monkeypatch.setattr(teacher_outputs, "compute", lambda *given: asked.append(len(given[2])) or compute(*given))
    first = given(parts, of(teacher))[1].splits["train"].samples.teacher
    again = given(parts, of(teacher), "--seed_everything=5", "--model.head.dim=8")[1].splits["train"].samples.teacher
    assert asked == [0]
    assert all((first[name] == again[name]).all() for name in first)
    given(parts, of(teacher), "--data.train_samples=50")
    assert asked == [0, 0]
    given(parts, of(teacher), FEATURES)
    assert asked == [0, 0, 3]
    (damaged, *_) = (tmp_path / "cache").glob("teacher-*.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:100])
    for options in ([], ["--data.train_samples=50"], [FEATURES]):
        given(parts, of(teacher), *options)
    assert len(asked) == 4


def test_a_missing_text_is_not_taken_from_the_cache_of_the_text_none(parts, write_manifest, teacher, monkeypatch):
    asked, compute = [], teacher_outputs.compute
    monkeypatch.setattr(teacher_outputs, "compute", lambda *given: asked.append(1) or compute(*given))
    for text in ("None", "", "a\nb"):
        given(parts, of(teacher), manifest=write_manifest(change=lambda i, row, text=text: row | {"text": text} if i < 9 else row))
    assert len(asked) == 3


def test_a_teacher_of_several_images_reads_samples_that_share_one(tmp_path):
    kind = ImageInput()
    kind.spec, kind.max_images = ImageSpec((8, 8)), 2
    paths = [str(tmp_path / f"{i}.png") for i in range(2)]
    for i, path in enumerate(paths):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(path)
    cells = [paths[1], paths[0], paths[1], None]
    table = SimpleNamespace(inputs={"image": cells}, files=["m"] * 4, rows=range(4))
    found = teacher_outputs.read(kind, table, "image", range(4))
    assert found.present.tolist() == [True, True, True, False]
    assert found.pixels[found.image_index[:3], 0, 0, 0].tolist() == [1, 0, 1]
    encoder = TimmImage("test_vit", pretrained=False, image_size=32).eval()
    features = encoder(found._replace(pixels=torch.rand(len(found.pixels), 3, 32, 32)))
    assert features.indices.tolist() == found.image_index.tolist()
    assert features.mask[:3].all()
    assert not features.mask[3].any()


def test_a_student_starts_from_the_weights_that_it_has_without_a_teacher(parts, teacher):
    alone, _, _ = plain = parts()
    plain[0].build(plain[1])
    taught, _ = given(parts, of(teacher))
    state = alone.model.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in taught.model.state_dict().items())


# The loss


def outputs(count, classes, seed):
    return torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


class AsIs(torch.nn.Module):
    """Instead of a map, to compare features directly."""

    def forward(self, x):
        return x


def test_the_loss_is_the_formula_of_the_docstring_also_where_samples_are_mixed_or_lack_an_input():
    task = Classification()
    task.learn({"train": ["a", "b", "c"]}, column="label", on_unseen="error")
    own = Distillation(Teacher("run", temperature=2.0, weight=0.3, features={"text": 0.5, "fused": 2.0}), task)
    own.maps.update({"text": AsIs(), "fused": AsIs()})
    x, q = outputs(4, 3, 0), outputs(4, 3, 1).softmax(dim=1)
    h, z = {name: outputs(4, 5, i) for i, name in enumerate(("text", "fused"))}, {name: outputs(4, 5, 7) for name in ("text", "fused")}
    z["text"][0] = torch.nan  # the teacher has no text
    retained = {"text": torch.tensor([True, True, False, True])}  # nor has the student there
    batch = fusion.data.samples.Batch({}, torch.zeros(4, dtype=torch.int64), torch.arange(4), teacher={"outputs": q, **z})
    output = FusionOutput(x, {}, features=h)

    def expected(rows):
        p = softmax(x.double().numpy() / 2)
        target = q.double().numpy()[rows]
        kl = 4 * (target * np.log(target / p)).sum(axis=1)
        text = ((h["text"] - z["text"][rows]).double().numpy() ** 2).mean(axis=1) / 2
        fused = ((h["fused"] - z["fused"][rows]).double().numpy() ** 2).mean(axis=1) / 2
        counted = retained["text"].numpy() & ~np.isnan(text)
        return 0.3 * kl + 0.5 * np.where(counted, text, 0) + 2.0 * fused

    label = torch.tensor(1.5)
    found = own.total(label, task, output, batch, retained)
    assert float(found) == pytest.approx(0.7 * 1.5 + expected([0, 1, 2, 3]).mean(), rel=1e-5)
    partner = [0, 3, 2, 1]  # mixed with samples that have the same inputs
    mixed = batch._replace(mixture=Mixture(torch.tensor(partner), torch.tensor(0.6)))
    found = own.total(label, task, output, mixed, retained)
    assert float(found) == pytest.approx(0.7 * 1.5 + (0.6 * expected([0, 1, 2, 3]) + 0.4 * expected(partner)).mean(), rel=1e-5)
    totals = {name: float(value) for name, value in own.sums.items()}
    assert totals["labels"] == pytest.approx(2 * 4 * 0.7 * 1.5)
    assert sum(totals.values()) > totals["labels"]


def learn(task, cells):
    task.learn({"train": cells}, column="label", on_unseen="error")
    return task


def test_ordered_classes_are_matched_by_name_and_labels_and_numbers_have_losses_of_their_own():
    low, high = learn(Ordinal(order=["1", "2", "3", "4"]), ["1", "4"]), learn(Ordinal(order=["4", "3", "2", "1"]), ["1", "4"])
    x = outputs(6, 3, 0)
    by_name = low.teacher_outputs(x)
    torch.testing.assert_close(by_name.exp(), low.values(x))
    for t in (1.0, 2.5):
        q = low.soft_target(by_name, t)
        np.testing.assert_allclose(q.numpy(), softmax(np.log(low.values(x.double()).numpy()) / t), atol=1e-5)
        assert low.distillation_loss(x, q, t).abs().max() < 1e-5
    reverse = [low.names.index(name) for name in high.names]
    assert reverse == [3, 2, 1, 0]
    mirrored = torch.cat([x.new_zeros(6, 1), torch.randn(6, 2)], dim=1).requires_grad_()
    high.distillation_loss(mirrored, high.soft_target(by_name[:, reverse], 1.0), 1.0).mean().backward()
    assert mirrored.grad.abs().max() > 0
    labels = learn(MultiLabel(), ["a;b", "c"])
    q = labels.soft_target(labels.teacher_outputs(x), 2.0)
    torch.testing.assert_close(q, (x / 2).sigmoid())
    assert labels.distillation_loss(x, q, 2.0).abs().max() < 1e-5


@pytest.mark.parametrize("form", ["mse", "huber", "quantile", "gaussian"])
@pytest.mark.parametrize("teachers", ["mse", "quantile", "gaussian"])
def test_a_number_is_learned_in_its_units_from_a_teacher_of_any_loss(form, teachers):
    teacher, student = learn(Regression(teachers), ["10", "30"]), learn(Regression(form), ["100", "104"])  # other means and deviations
    x = outputs(5, teacher.out_dim, 2)
    answers = np.array(teacher.answers(teacher.values(x).numpy()))
    np.testing.assert_allclose(teacher.teacher_outputs(x)[:, 0], answers, rtol=1e-5)
    soft = student.soft_target(teacher.teacher_outputs(x), 1.0)
    np.testing.assert_allclose(soft[:, 0], (answers - 102) / 2, rtol=1e-4)
    y = outputs(5, student.out_dim, 3).requires_grad_()
    own = np.array(student.answers(student.values(y.detach()).numpy()))
    loss = student.distillation_loss(y, soft, 1.0)
    np.testing.assert_allclose(loss.detach(), ((own - answers) / 2) ** 2 / 2, rtol=1e-4)
    loss.sum().backward()
    assert (y.grad != 0).sum() == 5  # of each sample its answer


# Runs


def test_a_run_learns_from_its_teacher_says_so_and_does_without_it_afterwards(tiny, fit_here, teacher, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(teacher, copy)
    long = ["--trainer.max_epochs=6", "--model.optimizer.lr=0.1"]
    alone = fit_here("--recipe", tiny(), *long, runs="alone")
    capsys.readouterr()
    run = fit_here("--recipe", tiny(), of(copy), "--model.teacher.weight=1", '--model.teacher.features={"text": 5}', *long, runs="taught")
    printed, found = capsys.readouterr().out, run.results()["teacher"]
    assert f"teacher: {copy}: weight 1, features of text 5\n" in printed
    assert found["runs"] == [str(copy)]
    assert (found["weight"], found["temperature"], found["shares"]["labels"]) == (1, 2, 0)
    soft, text, total = (np.array(run.column(f"train/{name}_step")) for name in ("teacher_loss", "teacher_text", "loss"))
    np.testing.assert_allclose(total, soft + 5 * text, rtol=1e-5)
    assert found["shares"]["outputs"] == pytest.approx(soft.sum() / total.sum(), abs=1e-5)
    assert f"teacher     {copy}: outputs {found['shares']['outputs']:.1%}, features of text {found['shares']['text']:.1%}" in printed
    assert "model.teacher" not in (alone.folder / "results.json").read_text()
    assert soft[-8:].mean() < soft[:8].mean() / 2
    assert text[-8:].mean() < 0.8 * text[:8].mean()
    shutil.rmtree(copy)
    rows, _ = rows_and_predictions(run, tmp_path / "manifest.csv")
    images, texts = [row["image"] for row in rows], [row["text"] for row in rows]
    last = {"checkpoint": "last"}
    p, other = (Predictor.load(folder, **last).predict(images, texts).values for folder in (run.folder, alone.folder))
    q = Predictor.load(teacher).predict(images, texts).values
    assert np.abs(p - q).mean() < np.abs(other - q).mean() / 2
    assert not [name for name in run.checkpoint()["state_dict"] if name.startswith("distillation.") and "maps.text" not in name]
    assert "distillation" not in (run.folder / "model" / "model.json").read_text()
    assert fusion.Run(run.folder).evaluate("test")["all"]["accuracy"] == pytest.approx(run.results()["test"]["accuracy"], abs=1e-6)


COMBINED = {
    "features, without some modalities": [FEATURES, "--model.modality_dropout=0.3", "--trainer.accumulate_grad_batches=2"],
    "fp16": [FEATURES, "--recipe=engine/amp", "--trainer.accelerator=cpu", "--model.checkpoint_activations=[image,text,head]"],
    "mixed, averaged, balanced": [FEATURES, "--model.mixing.mixup=0.4", "--recipe=engine/ema", "--model.balance=OGMGE"],
}


@pytest.mark.parametrize(
    "options", [pytest.param(o, id=name, marks=[] if "features" in name else pytest.mark.slow) for name, o in COMBINED.items()]
)
def test_a_run_that_was_interrupted_ends_as_an_undisturbed_one_with_the_same_report(tiny, assert_resumes_to_the_bit, teacher, options):
    assert_resumes_to_the_bit("--recipe", tiny(dropout=0.2), of(teacher), *options)


def test_accumulated_and_recomputed_batches_train_what_one_whole_batch_trains(tiny, fit_here, teacher):
    recipe = ["--recipe", tiny(), of(teacher), FEATURES]
    whole = fit_here(*recipe, runs="whole")
    small = ["--data.device_batch_size=4", "--model.checkpoint_activations=[image,text,head]"]
    accumulated = fit_here(*recipe, *small, runs="accumulated")
    assert furthest_weights(whole, accumulated) < ROUNDING
    assert whole.results()["teacher"]["shares"] == pytest.approx(accumulated.results()["teacher"]["shares"], abs=1e-5)


@pytest.mark.slow
def test_two_ranks_train_what_one_trains_and_ask_the_teacher_once(tiny, fit_here, fit_on_two, teacher, tmp_path):
    one = fit_here("--recipe", tiny(), of(teacher), FEATURES, runs="one")
    shutil.rmtree(tmp_path / "cache")
    two, printed = fit_on_two(tiny(), of(teacher), FEATURES, "--data.device_batch_size=4", runs="two")
    assert furthest_weights(one, two) < ROUNDING
    assert two.results()["teacher"]["shares"] == pytest.approx(one.results()["teacher"]["shares"], abs=1e-5)
    assert printed.count("teacher     ") == 1
    assert len(list((tmp_path / "cache").glob("teacher-*.safetensors"))) == 1


@pytest.mark.slow
def test_fsdp_learns_from_outputs_and_rejects_features(tiny, fit_here, fit_on_two, teacher):
    adam = ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=0.0015", "--model.optimizer.weight_decay=0.02"]
    one = fit_here("--recipe", tiny(), of(teacher), *adam, runs="one")
    fsdp = ["--recipe", "engine/fsdp", "--trainer.accelerator=cpu", "--trainer.devices=2"]
    two, _ = fit_on_two(tiny(), of(teacher), engine=fsdp, runs="two")
    assert two.column("train/teacher_loss_step") == pytest.approx(one.column("train/teacher_loss_step"), abs=ROUNDING)
    with pytest.raises(AssertionError, match="maps are not sharded by FSDP"):
        fit_on_two(tiny(), of(teacher), FEATURES, engine=fsdp, runs="features")


@pytest.mark.slow
def test_a_compiled_student_learns_alike(tiny, fit_here, teacher):
    short = ["--recipe", tiny(), of(teacher), FEATURES, *SHORT, *NO_VALIDATION, "--trainer.limit_test_batches=0"]
    plain, compiled = (fit_here(*short, f"--model.compile={on}", runs=on) for on in ("false", "true"))
    assert compiled.column("train/loss_step") == pytest.approx(plain.column("train/loss_step"), abs=1e-5)


def test_an_update_waits_for_the_device_once_with_a_teacher_too(tiny, fit_here, teacher, monkeypatch):
    count, usual = CountReads(2, 7), command.standing_callbacks
    monkeypatch.setattr(command, "standing_callbacks", lambda *given: [count, *usual(*given)])
    quiet = ["--trainer.max_epochs=1", "--trainer.log_every_n_steps=100"]
    fit_here("--recipe", tiny(), of(teacher), FEATURES, "--model.modality_dropout=0.3", *quiet)
    assert sum(count.an_update.values()) == 1, count.an_update


@pytest.mark.parametrize("task", ["Regression", *(pytest.param(name, marks=pytest.mark.slow) for name in ("MultiLabel", "Ordinal"))])
def test_runs_of_other_tasks_learn_from_a_teacher(tiny, write_manifest, fit_here, task):
    manifest = write_manifest(lambda i, row: row | {"label": str(len(row["text"]) % 3)})
    recipe = ["--recipe", tiny(manifest=manifest), f"--model.task={task}", *SHORT]
    teacher = fit_here(*recipe, runs="teacher")
    run = fit_here(*recipe, of(teacher.folder), "--model.teacher.weight=0.9", "--seed_everything=1", runs="taught")
    assert run.results()["teacher"]["shares"]["outputs"] > 0
    assert ("temperature" in run.results()["teacher"]) == (task != "Regression")


# Rejected


def test_a_run_is_not_resumed_with_another_teacher_but_with_a_moved_one(tiny, fit_here, teacher, tmp_path):
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(teacher, moved)
    run = fit_here("--recipe", tiny(), of(teacher), "--trainer.max_epochs=1")
    shutil.copytree(run.folder, other)
    with pytest.raises(UserError, match=r"model\.teacher: the teacher is not the one that the run began with"):
        fit(["--resume", str(run.folder), of(other), "--trainer.max_epochs=2"])
    assert fit_here("--resume", run.folder, of(moved), "--trainer.max_epochs=2").results()["updates"] == 16


def test_samples_that_the_teacher_was_trained_on_are_noted(tiny, parts, write_manifest, fit_here, teacher):
    _, data = given(parts, of(teacher))
    assert not any("teacher" in note for note in data.issues.notes)
    model, data, _ = parts(of(teacher), "--data.columns.split=null", "--data.split_seed=3")
    model.build(data)
    model.ask_teacher(data)
    own = data.record.columns
    count = trained_on(teacher, data.record)
    assert 0 < count < sum(split in ("val", "test") for split in own["split"])
    assert any(note.startswith(f"{count:,} samples of val and test were training samples of the teacher") for note in data.issues.notes)


ON = "--model.teacher.runs=TEACHER"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.teacher.weight=0.5"], "runs is empty; expected --model.teacher.runs=RUN"),
        (["--model.teacher.runs=nowhere"], "model.teacher.runs: there is no run "),
        (["--model.teacher.runs=[TEACHER, TEACHER]"], "runs has a run more than once"),
        ([ON, "--model.teacher.temperature=0"], "temperature is 0.0; expected a number above 0"),
        ([ON, "--model.teacher.weight=1.5"], "weight is 1.5; expected a share, from 0 to 1"),
        ([ON, "--model.teacher.weight=0"], "weight is 0 and there are no features"),
        ([ON, '--model.teacher.features={"text": 0}'], "features.text is 0.0; expected a number above 0"),
        ([ON, '--model.teacher.features={"txt": 1}'], "model.teacher.features: the model has no features 'txt': Did you mean text?"),
        ([ON, '--model.teacher.features={"fused": 1}', "--model.head=LogitMean"], "its head LogitMean has no fused features"),
        ([ON, '--model.teacher.features={"text": 1}', '--model.freeze={"text": {}}'], "the encoder of 'text' is frozen"),
        (["--model.teacher.runs=[TEACHER, OTHER]", '--model.teacher.features={"text": 1}'], "features are those of one teacher"),
        ([ON, "--model.task=MultiLabel"], "is Classification, but model.task is MultiLabel"),
        ([ON, "--model.modalities=[text]"], "reads 'image', but the inputs of this run are text"),
        ([ON, "--model.task=Regression", "--model.teacher.temperature=2"], "temperature is for classes and labels, not for Regression"),
        ([ON, "--model.task=Retrieval", "--model.head=DualEncoder"], "model.task=Retrieval has no loss by a teacher; leave out"),
        ([ON, "--model.teacher.weigth=1"], "weigth"),
    ],
)
def test_teachers_that_cannot_be_meant_are_rejected_before_training(tiny, teacher, tmp_path, options, message):
    words = [word.replace("TEACHER", str(teacher)) for word in options]
    with pytest.raises(UserError) as error:
        fit(["--recipe", str(tiny()), *words, *SHORT])
    assert message in str(error.value)
    assert not list((tmp_path / "runs").glob("*/*"))


def test_several_tasks_are_rejected_with_what_to_do_instead():
    tasks = MultiTask([SubTask(Classification(), column="a"), SubTask(Regression(), column="b")])
    with pytest.raises(UserError, match="MultiTask has no loss by a teacher; distil each of its tasks by itself"):
        Engine(image=lambda: None, text=lambda: None, task=tasks, teacher=Teacher("run"))


def test_a_class_that_the_teacher_lacks_is_rejected(parts, write_manifest, teacher):
    manifest = write_manifest(lambda i, row: row | {"label": "black" if i % 4 == 0 else row["label"]})
    with pytest.raises(UserError, match=r"doesn't know 'black', which train has; expected a teacher of all 9 of its names \(it knows 8\)"):
        given(parts, of(teacher), manifest=manifest)


def test_a_teacher_that_reads_less_is_accepted_unless_a_sample_has_none_of_it(tiny, parts, write_manifest, fit_here):
    reader = fit_here("--recipe", tiny(), "--model.modalities=[text]", *SHORT, runs="text").folder
    assert given(parts, of(reader))[1].splits["train"].samples.teacher["outputs"].shape == (136, 8)
    with pytest.raises(UserError, match=r"samples have none of the inputs that .* reads \(text\); the first: .*manifest\.csv, row"):
        given(parts, of(reader), manifest=write_manifest(without_some))


@pytest.mark.parametrize("what", ["outputs", "features 'text'"])
def test_outputs_that_are_not_finite_are_rejected_with_the_sample(parts, teacher, monkeypatch, what):
    load = Predictor.from_file

    def broken(path):
        predictor = load(path)
        layer = predictor.model.head.classifier if what == "outputs" else predictor.model.encoders["text"]
        with torch.no_grad():
            next(p for p in layer.parameters() if p.is_floating_point()).fill_(torch.nan)
        return predictor

    monkeypatch.setattr(distillation.Predictor, "from_file", staticmethod(broken))
    with pytest.raises(UserError, match=rf"model\.teacher: its {what} are not finite for .*manifest\.csv, row \d+; choose another teacher"):
        given(parts, of(teacher), FEATURES)


def test_the_setting_is_read_from_a_list_and_relative_paths_are_those_of_the_working_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = FusionCLI(["--recipe", str(tiny()), "--recipe=engine/distill", "--model.teacher.runs=a/b"]).config.model.teacher
    assert (one.runs, one.weight) == (str(tmp_path / "a/b"), 0.5)
    two = FusionCLI(["--recipe", str(tiny()), "--model.teacher.runs=[a, /b]"]).config.model.teacher
    assert two.runs == [str(tmp_path / "a"), "/b"]
