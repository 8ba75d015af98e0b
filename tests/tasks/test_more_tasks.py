"""Losses, scores and options of tasks: against scikit-learn and closed forms; thresholds, several targets, ordered classes."""

import json
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.stats import spearmanr
from sklearn import metrics as sklearn_metrics

from fusion.errors import UserError
from fusion.evaluation import score
from fusion.losses import effective_number_weights, focal_loss
from fusion.tasks import Classification, MultiLabel, Ordinal, Regression, Task
from fusion.tasks.metrics import CalibrationError, best_thresholds, multi_label_scores


def classifier(cells=("a", "a", "a", "b", "c", "c"), **options):
    task = Classification(**options)
    task.learn({"train": list(cells)}, column="label", on_unseen="error")
    return task


# Classification


@given(
    arrays.arrays(np.float64, (12, 7), elements=st.floats(-4, 4)),
    st.lists(st.integers(0, 6), min_size=12, max_size=12),
)
def test_every_score_of_classes_is_scikit_learns(logits, target):
    task = Classification()
    task.set_learnt({"names": list("abcdefg")})
    values = task.values(torch.from_numpy(logits))
    found = score(task, values, ["abcdefg"[i] for i in target])
    p = values.double().numpy()
    p /= p.sum(axis=1, keepdims=True)
    predicted, labels = values.numpy().argmax(axis=1), list(range(7))
    occurs = [c for c in labels if 0 < target.count(c) < len(target)]
    one_hot = np.eye(7)[target]

    def mean_by_class(one_against_rest):
        return np.mean([one_against_rest(one_hot[:, c], values.numpy()[:, c]) for c in occurs]) if occurs else np.nan

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = {
            "accuracy": sklearn_metrics.accuracy_score(target, predicted),
            "f1_micro": sklearn_metrics.f1_score(target, predicted, average="micro"),
            "f1_weighted": sklearn_metrics.f1_score(target, predicted, average="weighted", zero_division=0),
            "cohen_kappa": sklearn_metrics.cohen_kappa_score(target, predicted),
            "matthews": sklearn_metrics.matthews_corrcoef(target, predicted),
            "log_loss": sklearn_metrics.log_loss(target, p, labels=labels),
            "brier": ((p - one_hot) ** 2).sum(axis=1).mean(),
            "auroc": mean_by_class(sklearn_metrics.roc_auc_score),
            "average_precision": mean_by_class(sklearn_metrics.average_precision_score),
        }
    top5 = np.mean([y in np.argsort(-values.numpy()[i], kind="stable")[:5] for i, y in enumerate(target)])
    if all(len(set(row)) == 7 for row in values.tolist()):  # ties are broken otherwise
        expected["top5_accuracy"] = top5
    for name, value in expected.items():
        if np.isnan(value):
            assert name not in found, name
        else:
            assert found[name] == pytest.approx(value, abs=2e-5), name


def test_the_calibration_error_is_right_at_a_confidence_of_one():
    """A textbook case that torchmetrics 1.9 gives 0.525 for."""
    confidence = torch.tensor([1.0] * 10 + [0.55] * 10)
    hits = torch.tensor([1] * 5 + [0] * 5 + [1] * 10)
    probabilities = torch.stack([confidence, 1 - confidence], dim=1)
    metric = CalibrationError()
    metric.update(probabilities, 1 - hits)
    assert float(metric.compute()) == pytest.approx((0.5 + 0.45) / 2, abs=1e-6)


@given(arrays.arrays(np.float32, (30, 3), elements=st.floats(0, 1, width=32)), st.lists(st.integers(0, 2), min_size=30, max_size=30))
def test_the_calibration_error_is_the_mean_difference_over_its_bins(values, target):
    p = (values + 1e-3) / (values + 1e-3).sum(axis=1, keepdims=True)
    confidence, hit = p.max(axis=1).astype(np.float64), p.argmax(axis=1) == np.array(target)
    place = np.ceil(confidence * 15)
    expected = sum(abs(confidence[place == b].sum() - hit[place == b].sum()) for b in np.unique(place)) / 30
    metric = CalibrationError()
    for part in (slice(0, 11), slice(11, 30)):  # over batches
        metric.update(torch.from_numpy(p[part]), torch.tensor(target[part]))
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-6)


def test_classes_are_weighted_as_asked_and_unknown_ones_rejected():
    assert torch.equal(classifier(class_weights="effective", beta=0.9).class_weight, effective_number_weights(torch.tensor([3, 1, 2]), 0.9))
    assert classifier(class_weights={"b": 4.0}).class_weight.tolist() == [1.0, 4.0, 1.0]
    with pytest.raises(UserError, match="class_weights has 'd', which never occurs in train"):
        classifier(class_weights={"d": 1.0})
    with pytest.raises(UserError, match="class_weights of 'b' is -1"):
        classifier(class_weights={"b": -1})


def test_focal_loss_and_logit_adjustment_reach_the_loss_but_not_the_values():
    output, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    task = classifier(loss="focal", gamma=1.5, class_weights={"b": 2.0})
    assert torch.equal(task.loss(output, target), focal_loss(output, target, gamma=1.5, weight=torch.tensor([1.0, 2.0, 1.0])))
    adjusted = classifier(logit_adjustment=1.0)
    prior = torch.tensor([3 / 6, 1 / 6, 2 / 6])
    expected = -(output + prior.log()).log_softmax(dim=1)[torch.arange(4), target]
    assert torch.allclose(adjusted.loss(output, target), expected)
    assert torch.equal(adjusted.values(output), output.softmax(dim=1))


def test_logit_adjustment_raises_the_balanced_accuracy_on_a_long_tail():
    torch.manual_seed(0)
    target = torch.tensor([0] * 450 + [1] * 50)
    x = torch.randn(500, 2) + 1.2 * torch.nn.functional.one_hot(target, 2)
    recall = {}
    for tau in (0.0, 1.0):
        task = classifier(["0"] * 450 + ["1"] * 50, logit_adjustment=tau)
        layer = torch.nn.Linear(2, 2)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
        for _ in range(300):
            optimizer.zero_grad()
            task.loss(layer(x), target).mean().backward()
            optimizer.step()
        hit = layer(x).argmax(dim=1) == target
        recall[tau] = (hit[:450].float().mean() + hit[450:].float().mean()) / 2
    assert recall[1.0] > recall[0.0] + 0.05


def test_scores_by_class_average_to_those_of_all_also_beside_labels_that_train_lacks():
    task = classifier()
    cells = ["a", "b", "c", "new", "a", "newer", "b", "c"]
    task.encode(cells)
    values = torch.rand(8, 3, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    whole, single = score(task, values, cells), task.class_scores(values, torch.from_numpy(task.encode(cells)))
    assert list(single) == ["a", "b", "c"]
    assert [one["samples"] for one in single.values()] == [2, 2, 2]
    assert sum(one["recall"] for one in single.values()) / 5 == pytest.approx(whole["balanced_accuracy"])  # the new ones' is 0
    unknown = 2 * 0.5  # of equal probabilities, all 0
    assert (sum(one["auroc"] for one in single.values()) + unknown) / 5 == pytest.approx(whole["auroc"], abs=1e-6)


def test_metrics_that_count_alike_share_their_counts_and_agree_over_batches_and_resets():
    task = classifier()
    metrics = task.metrics()
    for _ in range(2):
        values, target = torch.rand(20, 3).softmax(dim=1), torch.randint(3, (20,))
        for part in (slice(0, 7), slice(7, 20)):
            task.update(metrics, values[part], target[part])
        whole = score(task, values, [task.names[i] for i in target.tolist()])
        for name, value in task.scores(metrics).items():
            assert float(value) == pytest.approx(whole[name], abs=1e-6), name
        metrics.reset()


# Labels


@given(
    arrays.arrays(np.float64, (9, 4), elements=st.floats(0, 1)),
    arrays.arrays(np.int64, (9, 4), elements=st.integers(0, 1)),
    st.lists(st.floats(0.1, 0.9), min_size=4, max_size=4),
)
def test_every_score_of_labels_is_scikit_learns(values, target, thresholds):
    found = multi_label_scores(torch.from_numpy(values), torch.from_numpy(target), torch.tensor(thresholds, dtype=torch.float64))
    predicted = values > np.array(thresholds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = {
            "f1_macro": sklearn_metrics.f1_score(target, predicted, average="macro", zero_division=0),
            "f1_micro": sklearn_metrics.f1_score(target, predicted, average="micro", zero_division=0),
            "f1_samples": sklearn_metrics.f1_score(target, predicted, average="samples", zero_division=1),
            "ranking_average_precision": sklearn_metrics.label_ranking_average_precision_score(target, values),
            "subset_accuracy": (target == predicted).all(axis=1).mean(),
        }
    for name, value in expected.items():
        if name == "f1_samples":  # scikit-learn's zero_division also takes a sample of one empty set for right
            both = target.sum(axis=1) + predicted.sum(axis=1)
            value = np.where(both > 0, 2 * (target * predicted).sum(axis=1) / np.maximum(both, 1), 1.0).mean()
        assert float(found[name]) == pytest.approx(value, abs=1e-5), name


@given(
    arrays.arrays(np.float32, (12, 2), elements=st.sampled_from([0.1, 0.2, 0.4, 0.7, 0.9])),
    arrays.arrays(np.int64, (12, 2), elements=st.integers(0, 1)),
)
def test_no_other_threshold_has_a_higher_f1(values, target):
    values, target = torch.from_numpy(values), torch.from_numpy(target)
    candidates = [0.05, 0.15, 0.3, 0.55, 0.8, 0.95]

    def f1(threshold, columns):
        p, y = values[:, columns] > threshold, target[:, columns].bool()
        return float(2 * (p & y).sum() / ((p.sum() + y.sum()).clamp(min=1)))

    own, shared = best_thresholds(values, target), best_thresholds(values, target, shared=True)
    for label in range(2):
        assert f1(own[label], [label]) >= max(f1(t, [label]) for t in candidates) - 1e-6 or not target[:, label].any()
    assert shared[0] == shared[1]
    assert f1(shared[0], [0, 1]) >= max(f1(t, [0, 1]) for t in candidates) - 1e-6 or not target.any()


def test_thresholds_are_tuned_on_validation_stored_and_used():
    task = MultiLabel(threshold="tuned_by_label")
    task.learn({"train": ["red;blue", "red", ""]}, column="tags", on_unseen="error")
    assert task.thresholds == [0.5, 0.5]
    metrics = task.metrics()
    values = torch.tensor([[0.9, 0.3], [0.8, 0.2], [0.6, 0.1]])
    task.update(metrics, values, torch.from_numpy(task.encode(["blue;red", "blue;red", ""])))
    task.tune(metrics)
    assert task.thresholds == pytest.approx([0.7, 0.15])
    assert float(task.scores(metrics)["subset_accuracy"]) == 1
    again = Task.from_state(json.loads(json.dumps(task.state())))
    assert again.answers(values.numpy()) == [["blue", "red"], ["blue", "red"], []]
    assert again.tuned == ("thresholds",)


def test_a_column_of_0_and_1_for_each_label_is_read_and_bad_cells_reported():
    task, bad = MultiLabel(), {}
    cells = task.joined({"red": ["1", "0", "yes", "2"], "blue": ["0", None, "TRUE", "1"]}, bad, {})
    assert [task.labels(cell) for cell in cells[:3]] == [["red"], [], ["red", "blue"]]
    assert bad == {3: "label red is '2', expected 0 or 1"}
    with pytest.raises(UserError, match="no training sample has the label 'blue'"):
        task.learn({"train": cells[:2]}, column="red,blue", on_unseen="error")
    with pytest.raises(UserError, match="names 2 columns, but Classification reads one"):
        Classification().joined({"a": [], "b": []}, {}, {})


def test_positive_weights_of_labels_are_those_asked_for():
    cells = {"train": ["red", "red;blue", "red", "red"]}
    task = MultiLabel(pos_weights="balanced")
    task.learn(cells, column="tags", on_unseen="error")
    assert task.pos_weight.tolist() == pytest.approx([3.0, 0.25])  # (4 - 1) / 1; red is everywhere, and still learnt
    given = MultiLabel(pos_weights={"blue": 2.0}, loss="focal", gamma=0)
    given.learn(cells, column="tags", on_unseen="error")
    output, target = torch.randn(3, 2), torch.tensor([[1, 0], [1, 1], [0, 0]], dtype=torch.uint8)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        output, target.float(), pos_weight=torch.tensor([2.0, 1.0]), reduction="none"
    ).mean(dim=1)
    assert torch.allclose(given.loss(output, target), expected)


# Numbers


def several(loss="mse", **options):
    task = Regression(loss=loss, **options)
    task.learn({"train": ["[1, 10]", "[2, 30]", "[4, 20]", "[9, 90]"]}, column="length,width", on_unseen="error")
    return task


def test_several_numbers_have_their_own_scales_scores_and_answers():
    task = several()
    assert (task.names, task.out_dim) == (["length", "width"], 2)
    target = np.array([[1, 10], [2, 30], [4, 20]], dtype=float)
    predicted = target + np.array([[1, -5], [0, 5], [-1, 5]])
    values = torch.from_numpy((predicted - task.mean) / task.deviation).float()
    found = score(task, values, [json.dumps(row) for row in target.tolist()])
    assert found["mae_length"] == pytest.approx(2 / 3, rel=1e-5)
    assert found["mae_width"] == pytest.approx(5, rel=1e-5)
    assert found["mae"] == pytest.approx((2 / 3 / task.deviation[0] + 5 / task.deviation[1]) / 2, rel=1e-5)
    assert found["spearman_width"] == pytest.approx(spearmanr(target[:, 1], predicted[:, 1]).statistic, abs=1e-5)
    assert np.allclose(task.answers(values.numpy()), predicted, rtol=1e-5)
    assert (
        task.check("[" * 100_000)
        == "label '[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[' begins like a list, but is not a JSON list of numbers"
    )
    assert task.check("[1, 2, 3]") == "label '[1, 2, 3]' has 3 numbers, expected 2"
    assert set(task.columns(values.numpy())) == {"length", "width"}
    assert set(found) - {"samples", "median"} == set(task.metric_names())
    with pytest.raises(UserError, match="lists of 1 and 2 numbers"):
        Regression().learn({"train": ["[1, 2]", "3"]}, column="y", on_unseen="error")


def test_columns_of_numbers_are_joined_and_bad_ones_reported():
    bad = {}
    cells = Regression().joined({"length": ["1", "x"], "width": ["2", "3"]}, bad, {})
    assert Regression().parts(cells[0]) == ["1", "2"]
    assert bad == {1: "label 'x' is not a number (column length)"}


@given(st.sampled_from(["quantile", "gaussian"]))
def test_an_interval_covers_its_share_of_a_normal_distribution(loss):
    rng = np.random.default_rng(0)
    numbers = 50 + 10 * rng.normal(size=4000)
    task = Regression(loss=loss)
    cells = [repr(float(number)) for number in numbers]
    task.learn({"train": cells}, column="y", on_unseen="error")
    exact = [-1.6448536, 0.0, 1.6448536] if loss == "quantile" else [0.0, 0.0]  # log variance
    values = task.values(torch.tensor([exact]).expand(4000, -1))
    found = score(task, values, cells)
    assert found["coverage"] == pytest.approx(0.9, abs=0.015)
    assert found["interval_width"] == pytest.approx(2 * 1.6448536 * numbers.std(), rel=1e-4)
    assert task.answers(values.numpy())[0] == pytest.approx(numbers.mean(), rel=1e-6)
    columns = task.columns(values.numpy())
    assert list(columns) == (["q_0.05", "q_0.5", "q_0.95"] if loss == "quantile" else ["deviation"])
    if loss == "gaussian":
        assert columns["deviation"][0] == pytest.approx(numbers.std(), rel=1e-5)


def test_quantiles_that_cross_are_put_in_order():
    task = Regression(loss="quantile")
    task.set_learnt({"names": ["y"], "mean": [0.0], "deviation": [1.0]})
    assert task.values(torch.tensor([[3.0, 1.0, 2.0]])).tolist() == [[1.0, 2.0, 3.0]]


@pytest.mark.parametrize("loss", ["mse", "quantile", "gaussian"])
def test_confidences_in_numbers_are_between_0_and_1_and_greatest_where_they_are_right(loss):
    task = several(loss)
    target = torch.from_numpy(task.encode(["[1, 10]"] * 2))
    right = target.repeat_interleave(task.width, dim=1)
    if loss == "gaussian":
        right[:, 1::2] = -9.0  # sure of itself
    found = task.confidence(torch.stack([right[0], right[1] + 1]), target)
    assert 0 < found[1] < found[0] <= 1


@pytest.mark.parametrize("form", ["quantile", "gaussian"])
def test_intervals_are_learnt_where_the_noise_differs(form):
    torch.manual_seed(0)
    x = torch.rand(2000, 1) * 2 - 1
    y = x[:, 0] + (0.1 + (x[:, 0] > 0)) * torch.randn(2000) * 0.3
    task = Regression(loss=form)
    cells = [repr(float(one)) for one in y]
    task.learn({"train": cells}, column="y", on_unseen="error")
    target = torch.from_numpy(task.encode(cells))
    net = torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.Tanh(), torch.nn.Linear(32, task.out_dim))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(600):
        optimizer.zero_grad()
        task.loss(net(x), target).mean().backward()
        optimizer.step()
    with torch.no_grad():
        found = score(task, task.values(net(x)), cells)
        columns = task.columns(task.values(net(torch.tensor([[-0.5], [0.5]]))).numpy())
    assert found["coverage"] == pytest.approx(0.9, abs=0.04)
    width = np.array(columns["deviation"]) if form == "gaussian" else np.array(columns["q_0.95"]) - np.array(columns["q_0.05"])
    assert width[1] > 4 * width[0]


# Ordered classes


def test_the_answer_of_ordered_classes_is_their_median_and_scores_are_scikit_learns():
    task = Ordinal()
    task.learn({"train": ["1", "2", "3", "10"]}, column="stars", on_unseen="error")
    assert task.names == ["1", "2", "3", "10"]  # by value, not as text
    torch.manual_seed(0)
    values = task.values(torch.randn(40, 3))
    assert torch.allclose(values.sum(dim=1), torch.ones(40))
    target = torch.randint(4, (40,)).tolist()
    predicted = [task.names.index(answer) for answer in task.answers(values.numpy())]
    p = values.double().numpy()
    expected = [min(range(4), key=lambda k, row=row: (row * abs(np.arange(4) - k)).sum()) for row in p]
    assert predicted == expected  # the least expected error
    found = score(task, values, [task.names[i] for i in target])
    assert found["accuracy"] == pytest.approx(np.mean(np.array(predicted) == target))
    assert found["mae"] == pytest.approx(np.abs(np.array(predicted) - target).mean())
    kappa = sklearn_metrics.cohen_kappa_score(target, predicted, weights="quadratic", labels=range(4))
    assert found["quadratic_kappa"] == pytest.approx(kappa, abs=1e-5)
    assert found["median"] == pytest.approx(np.abs(np.array(target) - np.floor(np.median(target))).mean())


def test_an_order_may_be_given_and_others_are_reported():
    task = Ordinal(order=["low", "middle", "high"])
    task.learn({"train": ["high", "low"], "val": ["middle"]}, column="level", on_unseen="error")
    assert task.encode(["low", "middle", "high"]).tolist() == [0, 1, 2]
    assert task.check("lower") == "label 'lower' is not in the task's order"
    assert Ordinal().check("low") == "label 'low' is not a number; classes of other names need the task's order"
    unseen = Ordinal()
    unseen.learn({"train": ["1", "2"], "test": ["3"]}, column="y", on_unseen="count_as_wrong")
    assert unseen.encode(["3"]).tolist() == [-1]
    assert float(unseen.loss(torch.randn(1, 1), torch.tensor([-1]))) == 0
    found = score(unseen, torch.tensor([[0.2, 0.8], [0.9, 0.1]]), ["3", "1"])
    assert (found["accuracy"], found["mae"]) == (0.5, 0)


# Options that contradict each other or make no sense


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Classification(gamma=1.0), "gamma is an option of loss=focal, but loss is cross_entropy"),
        (lambda: Classification(loss="focal", label_smoothing=0.1), "label_smoothing is an option of cross entropy, but loss is focal"),
        (lambda: Classification(beta=0.9), "beta is an option of class_weights=effective"),
        (lambda: Classification(class_weights="effective", beta=1.0), "beta is 1.0"),
        (lambda: Classification(logit_adjustment=-1), "logit_adjustment is -1"),
        (lambda: MultiLabel(threshold="tune"), "threshold is 'tune'; expected a probability, tuned or tuned_by_label"),
        (lambda: MultiLabel(pos_weights="ballanced"), "pos_weights is 'ballanced'; expected none, balanced, or numbers by label"),
        (lambda: MultiLabel(margin=0.1), "margin is an option of loss=asymmetric, but loss is bce"),
        (lambda: MultiLabel(loss="asymmetric", margin=1.0), "margin is 1.0"),
        (lambda: MultiLabel(loss="asymmetric", pos_weights="balanced"), "pos_weights and loss=asymmetric"),
        (lambda: MultiLabel(loss="focal", gamma=float("nan")), "gamma is nan"),
        (lambda: Regression(delta=1.0), "delta is an option of loss=huber, but loss is mse"),
        (lambda: Regression(loss="quantile", quantiles=[0.9, 0.1]), r"quantiles are \[0.9, 0.1\]; expected ascending"),
        (lambda: Regression(loss="quantile", quantiles=[0.0, 0.5]), "expected ascending probabilities"),
        (lambda: Ordinal(order=["a"]), "order is"),
        (lambda: Ordinal(order=["a", "a"]), "each once"),
    ],
)
def test_options_that_make_no_sense_are_rejected(make, message):
    with pytest.raises(UserError, match=message):
        make()
