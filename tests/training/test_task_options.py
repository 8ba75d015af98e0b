"""Runs whose task has thresholds to tune, ordered classes, several target columns; and what chooses their best checkpoint."""

import csv
import json

import pytest
from slow_cases import slow_except
from tiny_world import ROUNDING, SHORT, furthest_weights, rows_and_predictions

import fusion
from fusion.cli.evaluate import evaluate
from fusion.errors import UserError
from fusion.session import fit

TUNED = ["--model.task=MultiLabel", "--model.task.threshold=tuned_by_label"]
COLUMNS = ["--model.task=MultiLabel", "--data.columns.label=[agrees,long]"]
ORDINAL = ["--model.task=Ordinal"]
SEVERAL = ["--model.task=Regression", "--model.task.loss=gaussian", "--data.columns.label=[length,place]"]
TASKS = {"tuned": TUNED, "columns": COLUMNS, "ordinal": ORDINAL, "several": SEVERAL}
every_task = pytest.mark.parametrize("task", TASKS)


@pytest.fixture
def of_task(tiny, write_manifest):
    def write(task):
        def change(i, row):
            yes, long = row["label"] == "yes", len(row["text"]) > 22
            more = {"agrees": str(int(yes)), "long": str(int(long)), "length": str(len(row["text"])), "place": str(i % 7 / 2)}
            label = ";".join(name for name, there in (("yes", yes), ("long", long)) if there) if task == "tuned" else str(yes + 2 * long)
            return row | more | {"label": label}

        return tiny(manifest=write_manifest(change))

    return write


@every_task
def test_a_run_scores_and_predicts_as_its_model_does_elsewhere(of_task, fit_here, tmp_path, capsys, task):
    run = fit_here("--recipe", of_task(task), *TASKS[task], "--model.optimizer.lr=0.01")
    scores = run.results()["test"]
    assert evaluate(["--run", str(run.folder)]) == 0
    evaluated = json.loads((run.folder / "evaluation-test.json").read_text())["all"]
    assert {name: evaluated[name] for name in scores if name in evaluated} == pytest.approx(
        {name: value for name, value in scores.items() if name in evaluated}, abs=1e-4
    )
    rows, found = rows_and_predictions(run, tmp_path / "manifest.csv")
    predictor = fusion.load(str(run.folder))
    given = [i for i, row in enumerate(rows) if row["split"] == "test"]
    answers = predictor.predict(images=[rows[i]["image"] for i in given], texts=[rows[i]["text"] for i in given]).answers
    task_of_run = predictor.processor.task
    if task in ("tuned", "columns"):
        assert [task_of_run.labels(found[i]["prediction"]) for i in given] == answers
        names = ("agrees" if task == "columns" else "yes", "long")
        expected = [{name for name in names if rows[i][{"yes": "agrees"}.get(name, name)] == "1"} for i in given]
        exact = sum(set(answer) == right for answer, right in zip(answers, expected, strict=True)) / len(given)
        assert exact == pytest.approx(scores["subset_accuracy"], abs=1e-6)
    elif task == "ordinal":
        assert [found[i]["prediction"] for i in given] == answers
        mae = sum(abs(int(a) - int(rows[i]["label"])) for a, i in zip(answers, given, strict=True)) / len(given)
        assert mae == pytest.approx(scores["mae"], abs=1e-6)
    else:
        assert [json.loads(found[i]["prediction"]) for i in given] == [pytest.approx(answer) for answer in answers]
        mae = sum(abs(answer[0] - float(rows[i]["length"])) for answer, i in zip(answers, given, strict=True)) / len(given)
        assert mae == pytest.approx(scores["mae_length"], rel=1e-4)
        assert [float(found[i]["place"]) for i in given] == pytest.approx([answer[1] for answer in answers], abs=1e-5)
        places = [float(row["place"]) for row in rows]
        spread = max(places) - min(places)
        assert all(0 < float(found[i]["deviation_place"]) < spread for i in given)


@pytest.mark.parametrize("task", slow_except(TASKS, "tuned"))
def test_a_run_that_was_interrupted_ends_as_an_undisturbed_one(of_task, assert_resumes_to_the_bit, task):
    assert_resumes_to_the_bit("--recipe", of_task(task), *TASKS[task])


@pytest.mark.slow
@every_task
def test_two_ranks_train_and_tune_as_one_does(of_task, fit_here, fit_on_two, task):
    recipe = of_task(task)
    one, (two, _) = fit_here("--recipe", recipe, *TASKS[task], runs="one"), fit_on_two(recipe, *TASKS[task], runs="two")
    assert furthest_weights(one, two) < ROUNDING
    assert two.results()["test"] == pytest.approx(one.results()["test"], abs=2e-3)


def test_thresholds_are_those_of_the_validation_that_the_best_checkpoint_had(of_task, fit_here):
    run = fit_here("--recipe", of_task("tuned"), *TUNED, "--model.optimizer.lr=0.01")

    def thresholds(description):
        return description["processor"]["task"]["learnt"]["thresholds"]

    stored = thresholds(json.loads((run.folder / "model" / "model.json").read_text()))
    assert stored == thresholds(run.checkpoint("best")["fusion"])
    assert stored != [0.5, 0.5]
    assert fusion.load(str(run.folder)).processor.task.thresholds == stored


def test_cells_of_label_columns_that_are_neither_0_nor_1_are_listed(of_task, fit_here, tmp_path):
    recipe = of_task("columns")
    with open(tmp_path / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rows[3]["long"] = "perhaps"
    with open(tmp_path / "manifest.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    run = fit_here("--recipe", recipe, *COLUMNS, *SHORT)
    with open(run.folder / "data_issues.csv", newline="") as file:
        assert [(row["row"], row["reason"]) for row in csv.DictReader(file)] == [("5", "label long is 'perhaps', expected 0 or 1")]


@pytest.mark.parametrize("task", ["classes", *TASKS])
def test_each_class_is_scored_by_itself(of_task, fit_here, capsys, task):
    run = fit_here("--recipe", of_task(task), *TASKS.get(task, []), *SHORT)
    capsys.readouterr()
    if task == "several":
        with pytest.raises(UserError, match="has no classes to be scored by themselves"):
            evaluate(["--run", str(run.folder), "--classes"])
        return
    assert evaluate(["--run", str(run.folder), "--classes"]) == 0
    printed = capsys.readouterr().out
    found = json.loads((run.folder / "evaluation-test-classes.json").read_text())
    assert list(found) == fusion.load(str(run.folder)).processor.task.names
    scores = json.loads((run.folder / "evaluation-test.json").read_text())["all"]
    assert all(name in printed for name in found)
    if task == "classes":
        mean = sum(one["recall"] for one in found.values() if one["samples"]) / sum(one["samples"] > 0 for one in found.values())
        assert mean == pytest.approx(scores["balanced_accuracy"], abs=1e-6)
        assert sum(one["samples"] for one in found.values()) == scores["samples"]
        assert all(0 <= one["auroc"] <= 1 for one in found.values() if "auroc" in one)
        assert sum(one["auroc"] for one in found.values() if "auroc" in one) > 0
    elif task == "ordinal":
        assert sum(one["recall"] * one["samples"] for one in found.values()) / scores["samples"] == pytest.approx(
            scores["accuracy"], abs=1e-6
        )
    else:
        assert sum(one["f1"] for one in found.values()) / len(found) == pytest.approx(scores["f1_macro"], abs=1e-6)


# What chooses the best checkpoint


def chosen(run):
    states = run.checkpoint("best")["callbacks"]
    return next(float(state["best_model_score"]) for name, state in states.items() if name.startswith("BestAndLast"))


@pytest.mark.parametrize(("monitor", "best"), [("f1_macro", max), ("log_loss", min), ("auroc", max), ("val/brier", min), ("loss", min)])
def test_the_best_checkpoint_is_chosen_by_any_score_of_the_task(tiny, fit_here, monitor, best):
    run = fit_here("--recipe", tiny(), f"--monitor={monitor}", "--model.optimizer.lr=0.01", "--trainer.max_epochs=3")
    assert chosen(run) == pytest.approx(best(run.column(f"val/{monitor.removeprefix('val/')}")))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--monitor=f1_makro", "Classification has no such score. Did you mean f1_macro"),
        ("--monitor=test/accuracy", "chosen by a validation score; expected --monitor=accuracy"),
        ("--monitor=mae", "Classification has no such score"),
    ],
)
def test_a_score_that_the_task_does_not_have_is_rejected(tiny, option, message):
    with pytest.raises(UserError, match=message):
        fit(["--recipe", str(tiny()), option, *SHORT])


def test_early_stopping_follows_the_monitored_score_in_its_direction(tiny, fit_here):
    still = ["--model.optimizer.init_args.lr=0", "--trainer.max_epochs=9", "--recipe", "engine/early_stopping"]
    run = fit_here("--recipe", tiny(), *still, "--trainer.callbacks.patience=2", "--monitor=log_loss")
    assert len(run.column("val/log_loss")) == 3  # the first is an improvement, two are not
    slow = ["--model.optimizer.init_args.lr=0.0003", "--trainer.max_epochs=4", "--recipe", "engine/early_stopping"]
    falling = fit_here("--recipe", tiny(), *slow, "--trainer.callbacks.patience=1", "--monitor=loss", runs="falling")
    losses = falling.column("val/loss")
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 4
