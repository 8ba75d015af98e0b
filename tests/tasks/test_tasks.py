"""Tasks: how targets are read, each loss against its formula in float64, scores against scikit-learn's, and state."""

import json
import math
import warnings
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score, mean_absolute_error, mean_squared_error, r2_score

from fusion.errors import UserError
from fusion.evaluation import score
from fusion.tasks import Classification, MultiLabel, Regression, Task

NAMES = ["blue", "green", "red"]
label_text = st.text(st.characters(categories=["L", "N", "P", "Zs"]), min_size=1, max_size=6).map(str.strip).filter(bool)


def multi_label(**options):
    task = MultiLabel(**options)
    task.learn({"train": ["red;green", "blue", "", None]}, column="tags", on_unseen="error")
    return task


def regression(cells=("1", "2", "4", "9"), **options):
    task = Regression(**options)
    task.learn({"train": list(cells)}, column="price", on_unseen="error")
    return task


# Multi-label.


def test_labels_are_read_from_separated_text_and_from_lists():
    task = multi_label()
    assert task.names == NAMES
    cells = ["red; green", '["green", "red"]', " red ;; red", "", None, "[]", '["red", null]']
    assert task.encode(cells).tolist() == [[0, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1]]
    assert [task.check(cell) for cell in cells] == [None] * len(cells)
    assert task.check("[red") == "label '[red' begins like a list, but is not a JSON list of texts"
    assert task.check('[["red"]]') is not None


@given(st.lists(label_text, max_size=4, unique=True), st.sampled_from([";", ",", "|", " and "]))
def test_labels_that_are_written_are_read_again(labels, separator):
    task = MultiLabel(separator=separator)
    assert task.labels(task.cell_of(labels)) == labels


def test_the_loss_of_labels_is_binary_cross_entropy():
    task = multi_label()
    output = torch.randn(5, 3, dtype=torch.float64) * 30  # extreme ones too
    target = torch.from_numpy(task.encode(["red", "", "green;blue", "red;green;blue", "blue"]))
    # -log p and -log(1 - p), without taking differences of nearly equal numbers
    x, y = output.numpy(), target.numpy()
    expected = np.where(y == 1, np.logaddexp(0, -x), np.logaddexp(0, x)).mean(axis=1)
    assert np.allclose(task.loss(output, target).numpy(), expected, rtol=1e-12)
    assert task.loss(output.half(), target).isfinite().all()


@given(st.lists(st.tuples(st.tuples(*[st.floats(0, 1)] * 3), st.sets(st.sampled_from([*NAMES, "new"]))), min_size=1, max_size=20))
def test_scores_of_labels_are_scikit_learns(rows):
    task = multi_label()
    values = torch.tensor([list(p) for p, _ in rows], dtype=torch.float32)
    found = score(task, values, [";".join(sorted(labels)) for _, labels in rows])
    known = [*NAMES, *(["new"] if any("new" in labels for _, labels in rows) else [])]
    target = np.array([[name in labels for name in known] for _, labels in rows], dtype=int)
    p = np.concatenate([values.numpy(), np.zeros((len(rows), len(known) - 3))], axis=1)
    given_ = (p > 0.5).astype(int)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found["f1_macro"] == pytest.approx(f1_score(target, given_, average="macro", zero_division=0), abs=1e-6)
        assert found["f1_micro"] == pytest.approx(f1_score(target, given_, average="micro", zero_division=0), abs=1e-6)
        each = [average_precision_score(target[:, c], p[:, c]) for c in range(len(known)) if target[:, c].any()]
    assert found["subset_accuracy"] == pytest.approx((target == given_).all(axis=1).mean(), abs=1e-6)
    if each:
        assert found["average_precision"] == pytest.approx(np.mean(each), abs=1e-5)
    else:
        assert "average_precision" not in found


def test_labels_are_given_above_the_threshold():
    task = multi_label(threshold=0.3)
    assert task.answers(np.array([[0.3, 0.31, 0.9], [0.2, 0.2, 0.2]])) == [["green", "red"], []]


def test_labels_that_train_lacks_are_rejected_or_missed():
    cells = {"train": ["red"], "val": ["red;new"]}
    with pytest.raises(UserError, match=r"1 labels never occur in train: 'new' \(val\)"):
        MultiLabel().learn(cells, column="tags", on_unseen="error")
    task = MultiLabel()
    task.learn(cells, column="tags", on_unseen="count_as_wrong")
    assert (task.out_dim, task.encode(["new"]).tolist(), task.unseen(["new", "red"])) == (1, [[0, 1]], 1)
    with pytest.raises(UserError, match="no training sample has any label"):
        MultiLabel().learn({"train": ["", None]}, column="tags", on_unseen="error")


def test_a_label_has_one_spelling_alone_and_beside_others():
    task = MultiLabel()
    cells = ["1", "1.0;2.0", "[1.0, 2]", '["2.0", true]']  # a cell of one label comes as cell_text writes it
    task.learn({"train": cells}, column="tags", on_unseen="error")
    assert task.names == ["1", "2", "True"]
    assert task.check("[" * 100_000) is not None


# Regression.


@pytest.mark.parametrize("form", ["mse", "mae", "huber"])
def test_the_loss_of_a_number_is_that_of_its_standardised_target(form):
    numbers = np.array([1.0, 2.0, 4.0, 9.0])
    task = regression(loss=form, delta=0.5 if form == "huber" else None)
    z = (numbers - numbers.mean()) / numbers.std()
    output = torch.tensor([[0.0], [5.0], [-1.0], [0.2]], dtype=torch.float64)
    error = output.numpy()[:, 0] - z
    huber = np.where(abs(error) <= 0.5, error**2 / 2, 0.5 * (abs(error) - 0.25))
    expected = {"mse": error**2 / 2, "mae": abs(error), "huber": huber}[form]
    assert np.allclose(task.loss(output, torch.from_numpy(task.encode(["1", "2", "4", "9"]))).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_scores_of_numbers_are_in_their_units_and_scikit_learns(offset):
    rng = np.random.default_rng(0)
    target = offset + rng.normal(size=50) * 3
    cells = [repr(float(number)) for number in target]
    task = regression(cells)
    values = torch.randn(50, 1)
    predicted = task.in_units(values.numpy())[:, 0]
    found = score(task, values, cells)
    assert found["mae"] == pytest.approx(mean_absolute_error(target, predicted), rel=1e-5)
    assert found["rmse"] == pytest.approx(math.sqrt(mean_squared_error(target, predicted)), rel=1e-5)
    assert found["r2"] == pytest.approx(r2_score(target, predicted), rel=1e-4)
    assert found["median"] == pytest.approx(np.abs(target - np.median(target)).mean(), rel=1e-9)
    assert task.answers(values.numpy()) == predicted.tolist()


@pytest.mark.parametrize("cells", [["3"], ["100.7"] * 9])
def test_numbers_that_do_not_differ_have_no_share_of_variance(cells):
    found = score(regression([str(i) for i in range(60)]), torch.zeros(len(cells), 1), cells)
    assert "r2" not in found
    assert found["mae"] > 0


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (None, "label is missing"),
        ("red", "label 'red' is not a number"),
        ("1,5", "label '1,5' is not a number"),
        ("1_000", "label '1_000' is not a number"),
        ("nan", "label 'nan' is not a number"),
        ("inf", "label 'inf' is not a number"),
        ("1e31", "label '1e31' is beyond 1e+30"),
        ("-1.5e-3", None),
        (".5", None),
        ("+7", None),
    ],
)
def test_only_numbers_are_targets_of_a_regression(cell, reason):
    assert Regression().check(cell) == reason


@pytest.mark.parametrize("cells", [["3", "3.0"], ["3"], [], ["1e-200", "2e-200"]])
def test_targets_that_are_all_one_number_are_rejected(cells):
    with pytest.raises(UserError, match=r"a regression needs different targets.*column 'price'"):
        regression(cells)


def test_splits_of_numbers_have_alike_ranges():
    strata = regression().strata([str(i) for i in range(40)])
    assert [strata.count(name) for name in sorted(set(strata))] == [10] * 4
    assert strata[0] != strata[39]


# All of them.

MADE = {
    "classification": lambda: learnt(Classification(label_smoothing=0.1), ["yes", "no", "yes"]),
    "multi-label": multi_label,
    "regression": regression,
}


def learnt(task, cells):
    task.learn({"train": cells}, column="label", on_unseen="error")
    return task


@pytest.mark.parametrize("kind", MADE)
def test_state_is_plain_data_and_brings_the_task_back(kind):
    task = MADE[kind]()
    again = Task.from_state(json.loads(json.dumps(task.state())))
    assert again.state() == task.state()
    assert not again.state_dict()  # nothing of it is among the weights
    values = np.random.default_rng(0).random((6, task.out_dim), dtype=np.float32)
    assert again.answers(values) == task.answers(values)
    assert again.out_dim == task.out_dim


def test_a_state_that_names_no_task_is_rejected():
    state = Classification().state()
    for named, message in (("torch.nn.Linear", "but it is no Task"), ("nowhere.Task", "can't be imported here")):
        with pytest.raises(UserError, match=message):
            Task.from_state(state | {"class": named})


@pytest.mark.parametrize("kind", MADE)
@given(data=st.data())
def test_no_function_of_what_is_seen_betters_the_bound(kind, data):
    """Every function from what is seen to an answer, of those that occur, is tried."""
    answers = {"classification": ["yes", "no"], "multi-label": ["red", "blue;red", ""], "regression": ["1", "2", "9"]}[kind]
    rows = data.draw(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(answers)), min_size=1, max_size=8))
    seen, cells = map(list, zip(*rows, strict=True))
    task = MADE[kind]()
    worth = {
        "classification": lambda cell, answer: cell == answer,
        "multi-label": lambda cell, answer: set(cell.split(";")) == set(answer.split(";")),
        "regression": lambda cell, answer: -abs(float(cell) - float(answer)),
    }[kind]
    best = defaultdict(lambda: -math.inf)
    for what in set(seen):
        for answer in answers:
            total = sum(worth(cell, answer) for s, cell in rows if s == what)
            best[what] = max(best[what], total)
    assert task.bound(seen, cells) == pytest.approx(abs(sum(best.values())) / len(rows))


@pytest.mark.parametrize("kind", MADE)
def test_confidence_is_between_none_and_all(kind):
    task = MADE[kind]()
    cells = {"classification": ["yes", "no"], "multi-label": ["red", ""], "regression": ["1", "9"]}[kind]
    target = torch.from_numpy(task.encode(cells))
    confidence = task.confidence(torch.randn(2, task.out_dim) * 5, target)
    assert confidence.shape == (2,)
    assert ((confidence >= 0) & (confidence <= 1)).all()


def test_confidence_of_a_class_is_its_probability():
    task = learnt(Classification(label_smoothing=0.2), ["a", "b", "c"])
    output = torch.randn(3, 3)
    expected = output.softmax(dim=1)[torch.arange(3), torch.tensor([2, 0, 1])]
    assert torch.allclose(task.confidence(output, torch.tensor([2, 0, 1])), expected)
