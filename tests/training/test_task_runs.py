"""Runs of tasks other than classification: trained, scored, predicted, continued and balanced like any other."""

import csv
import json

import pytest
from slow_cases import slow_except
from tiny_world import ROUNDING, SHORT, furthest, furthest_weights, rows_and_predictions

import fusion
from fusion.cli.evaluate import evaluate
from fusion.errors import UserError
from fusion.session import fit

LABELS = "--model.task=MultiLabel"
NUMBER = "--model.task=Regression"


@pytest.fixture
def of_task(tiny, write_manifest):
    """The recipe of the tiny world with targets for a task: the words of an answer and its length, or numbers."""

    def write(task):
        def change(i, row):
            if task == LABELS:
                return row | {"label": ";".join(filter(None, [row["label"], "long" if len(row["text"]) > 22 else ""]))}
            return row | {"label": f"{1000 + len(row['text']) + (row['label'] == 'yes') * 5}.5"}

        return tiny(manifest=write_manifest(change))

    return write


@pytest.mark.parametrize("task", [LABELS, NUMBER])
def test_a_run_is_scored_and_predicts_in_the_task_s_own_terms(of_task, fit_here, tmp_path, capsys, task):
    run = fit_here("--recipe", of_task(task), task, "--model.optimizer.lr=0.01")
    told = capsys.readouterr().out
    scores = run.results()["test"]
    monitor = {LABELS: "average_precision", NUMBER: "mae"}[task]
    assert f"val {monitor}" in told
    assert run.column(f"val/{monitor}")
    best = run.checkpoint("best")["callbacks"]
    chosen = next(float(state["best_model_score"]) for name, state in best.items() if name.startswith("BestAndLast"))
    assert chosen == pytest.approx((min if task == NUMBER else max)(run.column(f"val/{monitor}")))
    assert ("upper bound (text only)" in told) == (task == LABELS)
    assert ("lower bound (text only)" in told) == (task == NUMBER)
    # evaluate, the predictions' file and the predictor agree with what the engine scored
    assert evaluate(["--run", str(run.folder)]) == 0
    evaluated = json.loads((run.folder / "evaluation-test.json").read_text())["all"]
    for name in ("average_precision", "f1_macro", "subset_accuracy") if task == LABELS else ("mae", "rmse", "r2"):
        assert evaluated[name] == pytest.approx(scores[name], abs=1e-4), name
    rows, found = rows_and_predictions(run, tmp_path / "manifest.csv")
    predictor = fusion.load(str(run.folder))
    answers = predictor.predict(images=[row["image"] for row in rows[:5]], texts=[row["text"] for row in rows[:5]]).answers
    if task == LABELS:
        assert [predictor.processor.task.labels(row["prediction"]) for row in found[:5]] == answers
        tested = [(set(row["label"].split(";")), set(filter(None, f["prediction"].split(";")))) for row, f in zip(rows, found, strict=True)]
        exact = [a == b for (a, b), row in zip(tested, rows, strict=True) if row["split"] == "test"]
        assert sum(exact) / len(exact) == pytest.approx(scores["subset_accuracy"], abs=1e-6)
    else:
        assert [float(row["prediction"]) for row in found[:5]] == pytest.approx(answers)
        errors = [abs(float(r["label"]) - float(f["prediction"])) for r, f in zip(rows, found, strict=True) if r["split"] == "test"]
        assert sum(errors) / len(errors) == pytest.approx(scores["mae"], rel=1e-4)
        assert 1000 < min(answers) < max(answers) < 1060  # in the target's units


@pytest.mark.parametrize("task", slow_except([LABELS, NUMBER], LABELS))
def test_a_run_that_was_interrupted_goes_on_to_the_bit(of_task, assert_resumes_to_the_bit, task):
    assert_resumes_to_the_bit("--recipe", of_task(task), task, "--model.balance=OGMGE", "--model.modality_dropout=0.2")


@pytest.mark.slow
@pytest.mark.parametrize("task", [LABELS, NUMBER])
def test_two_ranks_and_accumulated_batches_train_what_one_does(of_task, fit_here, fit_on_two, task):
    recipe = of_task(task)
    one = fit_here("--recipe", recipe, task, runs="one")
    parts = fit_here("--recipe", recipe, task, "--trainer.accumulate_grad_batches=4", runs="parts")
    two, _ = fit_on_two(recipe, task, runs="two")
    for other in (parts, two):
        assert furthest(one.column("train/loss_step"), other.column("train/loss_step")) < ROUNDING
        assert furthest_weights(one, other) < ROUNDING
    assert two.results()["test"] == pytest.approx(one.results()["test"], abs=1e-3)


@pytest.mark.parametrize("task", slow_except([LABELS, NUMBER], LABELS))
def test_ranks_without_a_sample_to_score_take_part_in_the_scores(of_task, fit_here, fit_on_two, tmp_path, task):
    """One sample to validate, three to test, over two ranks."""
    recipe = of_task(task)
    with open(tmp_path / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    few = {"val": 1, "test": 3}
    kept = [row for row in rows if row["split"] == "train" or (few.update({row["split"]: few[row["split"]] - 1}) or few[row["split"]] >= 0)]
    with open(tmp_path / "manifest.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, kept[0])
        writer.writeheader()
        writer.writerows(kept)
    one = fit_here("--recipe", recipe, task, "--trainer.max_steps=2", "--trainer.val_check_interval=2", runs="one")
    two, _ = fit_on_two(recipe, task, "--trainer.max_steps=2", "--trainer.val_check_interval=2", runs="two")
    assert two.results()["test"] == pytest.approx(one.results()["test"], abs=1e-3)


@pytest.mark.parametrize("head", ["ProductOfExperts", "Stacking", "ConfidenceWeighted"])
def test_heads_that_take_one_class_for_right_are_rejected(of_task, head):
    with pytest.raises(UserError, match=f"the head {head} treats its outputs as classes of which exactly one is right.*in MultiLabel"):
        fit(["--recipe", str(of_task(LABELS)), LABELS, f"--model.head={head}", *SHORT])


def test_targets_that_a_task_cannot_use_are_listed_with_their_reason(tiny, write_manifest, fit_here):
    wrong = {3: "", 4: "many", 5: "inf"}
    manifest = write_manifest(lambda i, row: row | {"label": wrong.get(i, f"{i}")})
    run = fit_here("--recipe", tiny(manifest=manifest), NUMBER, *SHORT)
    with open(run.folder / "data_issues.csv", newline="") as file:
        reasons = [row["reason"] for row in csv.DictReader(file)]
    assert reasons == ["label is missing", "label 'many' is not a number", "label 'inf' is not a number"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.task=Regresion"], "Did you mean Regression"),
        ([NUMBER, "--model.task.losss=mae"], "losss"),
        ([NUMBER, "--model.task.loss=mea"], "Did you mean mse or mae"),
        (["--model.task.label_smoothing=2"], "label_smoothing is 2.0"),
        ([LABELS, "--model.task.threshold=0"], "threshold is 0.0"),
    ],
)
def test_mistakes_in_a_task_s_options_name_the_nearest(of_task, options, message):
    with pytest.raises(UserError, match=message):
        fit(["--recipe", str(of_task(NUMBER)), *options, *SHORT])
