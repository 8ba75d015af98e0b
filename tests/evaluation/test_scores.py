"""Scores against scikit-learn's, on small and degenerate splits."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score
from torch.nn.functional import one_hot

from fusion.evaluation import score, scores_by_group
from fusion.tasks import Classification
from fusion.tasks.metrics import classification_metrics

CLASSES = ["a", "b", "c", "d"]


def by_scikit_learn(predicted, labels):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that are predicted but do not occur, which is what is tested
        return {
            "accuracy": accuracy_score(labels, predicted),
            "balanced_accuracy": balanced_accuracy_score(labels, predicted),
            "f1_macro": f1_score(labels, predicted, average="macro", zero_division=0),
        }


def task_and_values(predicted, classes):
    """A task that knows these classes, and values by which it predicts so."""
    task = Classification()
    task.set_learnt({"names": list(classes)})
    return task, torch.eye(len(classes))[[classes.index(name) for name in predicted]]


@given(st.lists(st.tuples(st.sampled_from(CLASSES), st.sampled_from([*CLASSES, "new", "newer"]), st.sampled_from("xyz")), min_size=1))
def test_scores_of_all_and_of_each_group_are_scikit_learns(rows):
    predicted, labels, groups = zip(*rows, strict=True)
    found = scores_by_group(*task_and_values(predicted, CLASSES), labels, groups)
    assert found.keys() == {"all", *groups}
    for group, scores in found.items():
        inside = [(p, y) for p, y, g in rows if group in ("all", g)]
        for name, expected in by_scikit_learn(*zip(*inside, strict=True)).items():
            assert scores[name] == pytest.approx(expected, abs=1e-6), (group, name)


def test_a_class_that_is_predicted_but_never_occurs_has_no_recall_to_average():
    assert score(*task_and_values(["a", "c", "b", "a"], ["a", "b", "c"]), ["a", "a", "b", "b"])["balanced_accuracy"] == pytest.approx(0.5)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=2), st.integers(1, 10))
def test_metrics_over_batches_are_those_of_the_whole(rows, cut):
    metrics = classification_metrics(6)
    for batch in (rows[:cut], rows[cut:]):
        if batch:
            predicted, target = zip(*batch, strict=True)
            metrics.update(one_hot(torch.tensor(predicted), 6).float(), torch.tensor(target))
    predicted, target = zip(*rows, strict=True)
    for name, expected in by_scikit_learn(predicted, target).items():
        assert float(metrics.compute()[name]) == pytest.approx(expected, abs=1e-6)
