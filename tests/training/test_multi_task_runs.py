"""Runs of several tasks: any division of an update and a resumed run train the same, weights adapt, and the model is used."""

import csv
import json

import pytest
from slow_cases import slow_except
from test_precision import FP16
from tiny_world import ROUNDING, furthest, furthest_weights, rows_and_predictions

import fusion
from fusion.cli.evaluate import evaluate
from fusion.errors import UserError
from fusion.session import fit

TASKS = [
    {"column": "answer", "task": {"class_path": "Classification", "init_args": {"class_weights": "balanced"}}},
    {"column": "length", "task": {"class_path": "Regression"}, "weight": 0.5},
]
ALIGNED = [*TASKS, {"task": {"class_path": "Retrieval", "init_args": {"dim": 8}}, "weight": 0.1, "head": "DualEncoder"}]


def options(tasks=TASKS, *more):
    return ["--model.task=MultiTask", f"--model.task.tasks={json.dumps(tasks)}", *more]


@pytest.fixture
def several(tiny, write_manifest):
    """The recipe of the tiny world, with two targets, of which some samples have one."""

    def change(i, row):
        answer = {"answer": "" if i % 5 == 0 else row["label"], "length": "" if i % 7 == 1 else str(len(row["text"]) + i % 3)}
        return {name: cell for name, cell in row.items() if name != "label"} | answer

    return lambda: tiny(manifest=write_manifest(change))


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--model.task.weighting=gradnorm"]], ids=["fixed", "gradnorm"])
def test_any_division_of_an_update_trains_the_same(several, fit_here, fit_on_two, more):
    recipe = several()
    whole = fit_here("--recipe", recipe, *options(TASKS, *more), runs="whole")
    assert whole.column("train/loss_epoch")[-1] < whole.column("train/loss_epoch")[0]
    divided = fit_here("--recipe", recipe, *options(TASKS, *more), "--trainer.accumulate_grad_batches=4", runs="divided")
    ranks, _ = fit_on_two(recipe, *options(TASKS, *more), runs="ranks")
    for other in (divided, ranks):
        assert furthest_weights(whole, other) < ROUNDING
        assert furthest(whole.column("train/loss_epoch"), other.column("train/loss_epoch")) < 1e-4
        if more:
            assert furthest(whole.column("weights/answer"), other.column("weights/answer")) < 1e-4
    if more:
        assert len(set(whole.column("weights/answer"))) > 2


@pytest.mark.slow
def test_an_alignment_beside_other_tasks_is_right_over_ranks_and_accumulation(several, fit_here, fit_on_two):
    recipe = several()
    whole = fit_here("--recipe", recipe, *options(ALIGNED), runs="whole")
    divided, _ = fit_on_two(recipe, *options(ALIGNED), "--trainer.accumulate_grad_batches=2", runs="ranks")
    assert furthest_weights(whole, divided) < ROUNDING
    assert "retrieval_recall_1" in whole.results()["test"]


@pytest.mark.parametrize("weighting", slow_except(["gradnorm", "uncertainty", "dynamic"], "gradnorm"))
@pytest.mark.parametrize("precision", slow_except([[], FP16], FP16), ids=["fp32", "fp16"])
def test_a_run_that_was_interrupted_ends_as_an_undisturbed_one(several, assert_resumes_to_the_bit, weighting, precision):
    assert_resumes_to_the_bit(
        "--recipe", several(), *options(TASKS, f"--model.task.weighting={weighting}"), *precision, "--trainer.max_epochs=4"
    )


def test_learned_variances_weigh_the_noisier_task_less(several, fit_here):
    run = fit_here(
        "--recipe", several(), *options(TASKS, "--model.task.weighting=uncertainty"), "--model.optimizer.lr=0.1", "--trainer.max_epochs=6"
    )
    variances = run.checkpoint()["state_dict"]["model.head.log_variance"]
    assert variances.abs().min() > 0.01


def test_a_run_scores_and_predicts_as_its_model_does_elsewhere(several, fit_here, tmp_path, capsys):
    run = fit_here("--recipe", several(), *options(ALIGNED), "--monitor=answer_accuracy")
    scores = run.results()["test"]
    assert {"answer_accuracy", "length_mae", "loss"} <= scores.keys()
    assert evaluate(["--run", str(run.folder), "--classes"]) == 0
    assert "answer yes" in capsys.readouterr().out
    evaluated = json.loads((run.folder / "evaluation-test.json").read_text())["all"]
    shared = [name for name in scores if name in evaluated and name != "loss"]
    assert len(shared) > 10
    assert {name: evaluated[name] for name in shared} == pytest.approx({name: scores[name] for name in shared}, abs=1e-4)
    rows, found = rows_and_predictions(run, tmp_path / "manifest.csv")
    predictor = fusion.load(str(run.folder))
    answers = predictor.predict(images=[row["image"] for row in rows], texts=[row["text"] for row in rows]).answers
    assert [row["answer_prediction"] for row in found] == [answer["answer"] for answer in answers]
    tested = [i for i, row in enumerate(rows) if row["split"] == "test" and row["answer"]]
    right = sum(answers[i]["answer"] == rows[i]["answer"] for i in tested) / len(tested)
    assert right == pytest.approx(scores["answer_accuracy"], abs=1e-6)


def test_a_bad_target_is_reported_with_its_task(several, fit_here, tmp_path):
    recipe = several()
    with open(tmp_path / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rows[3]["length"] = "long"
    rows[4] |= {"length": "", "answer": ""}
    with open(tmp_path / "manifest.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    run = fit_here("--recipe", recipe, *options(), "--trainer.max_epochs=1")
    with open(run.folder / "data_issues.csv", newline="") as file:
        reasons = {int(row["row"]): row["reason"] for row in csv.DictReader(file)}
    assert reasons[5] == "length: label 'long' is not a number"  # the header is line 1
    assert all(reason == "all labels are missing" for row, reason in reasons.items() if row != 5)
    lacking = [i + 2 for i, row in enumerate(rows) if not row["length"] and not row["answer"]]
    assert 6 in lacking
    assert sorted(row for row in reasons if row != 5) == lacking


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--monitor=accuracy"], r"MultiTask has no such score. Did you mean"),
        (["--model.balance=OGMGE"], "model.balance needs a prediction of each modality alone"),
        (['--model.task.tasks=[{"task": "Ordinal", "column": "nowhere"}, {"task": "Ordinal", "column": "length"}]'], "no column 'nowhere'"),
    ],
)
def test_options_that_clash_with_it_are_rejected(several, more, message):
    with pytest.raises(UserError, match=message):
        fit(["--recipe", str(several()), *options(), *more])
