"""Several tasks at once: targets, losses and weights against the tasks alone and the papers' formulas."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusion.errors import UserError
from fusion.heads import Concat, DualEncoder, PerTask
from fusion.tasks import Classification, MultiLabel, MultiTask, Ordinal, Regression, Retrieval, SubTask, Task
from fusion.tasks.base import Pool
from fusion.tasks.weighting import dynamic_weights, gradnorm_weights

MOOD = ["good", "bad", None, "good", "bad", "fair"]
PRICE = ["1.5", None, "2.0", "4.0", "3.0", "9.5"]
TAGS = ["a;b", None, "b", "", "a", "b"]


def several(**options):
    return MultiTask(
        [
            SubTask(Classification(class_weights="balanced"), "mood", weight=2.0),
            SubTask(Regression(loss="mse"), "price"),
            SubTask(MultiLabel(), "tags", weight=0.5),
        ],
        **options,
    )


def learned(task=None):
    task = task or several()
    cells = task.joined({"mood": MOOD, "price": PRICE, "tags": TAGS}, {}, {})
    task.learn({"train": cells}, column="", on_unseen="error")
    return task, torch.from_numpy(task.encode(cells))


def test_targets_of_each_task_come_back_as_its_own_and_missing_ones_are_known():
    task, target = learned()
    mood, price, tags = task.targets(target)
    assert mood[0][mood[1]].tolist() == [2, 0, 2, 0, 1]
    assert mood[1].tolist() == [True, True, False, True, True, True]
    assert mood[0].dtype == torch.int64
    alone = Regression(loss="mse")
    alone.learn({"train": [cell for cell in PRICE if cell]}, column="price", on_unseen="error")
    assert torch.equal(price[0][price[1]], torch.from_numpy(alone.encode([cell for cell in PRICE if cell])))
    assert tags[1].all()  # a sample without labels is one of this task
    assert tags[0].sum(dim=1).tolist() == [2, 0, 1, 0, 1, 1]


@given(st.integers(0, 1000), st.sampled_from([(6,), (3, 3), (1, 2, 3), (4, 2)]))
def test_the_loss_is_the_weighted_sum_of_the_tasks_own_over_their_samples_however_divided(seed, sizes):
    task, target = learned()
    output = torch.randn(6, task.out_dim, generator=torch.Generator().manual_seed(seed))
    expected = 0.0
    for own, out, cells, weight in zip(task.each, task.outputs(output), (MOOD, PRICE, TAGS), (2.0, 1.0, 0.5), strict=True):
        rows = [i for i, cell in enumerate(cells) if cell is not None or isinstance(own, MultiLabel)]
        of_rows = torch.from_numpy(own.encode([cells[i] for i in rows]))
        expected += weight * float(own.update_loss(out[rows], of_rows).mean())
    each = [task.update_loss(o, t, target) for o, t in zip(output.split(sizes), target.split(sizes), strict=True)]
    assert float(torch.cat(each).mean()) == pytest.approx(expected, rel=1e-5)


def test_a_target_that_is_missing_has_no_influence():
    task, target = learned()
    output = torch.randn(6, task.out_dim, requires_grad=True)
    task.update_loss(output, target).mean().backward()
    mood = output.grad[:, :3]
    assert (mood[2] == 0).all()
    assert (mood[[0, 1, 3, 4, 5]] != 0).any(dim=1).all()


def test_uncertainty_is_the_formula_of_the_paper_and_its_variances_are_learned():
    task = several(weighting="uncertainty")
    _, target = learned(task)
    output = torch.randn(6, task.out_dim, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    s = np.array([0.3, -0.5, 1.0], dtype=np.float32)
    output[:, -3:] = torch.from_numpy(s)
    output.requires_grad_()
    losses = torch.stack([loss.mean() for loss in task.update_losses(output, target)]).detach().double().numpy()
    weighted = np.array([2.0, 1.0, 0.5]) * losses
    expected = (weighted * np.exp(-s.astype(np.float64)) + s / 2).sum()
    total = task.update_loss(output, target).mean()
    assert total.item() == pytest.approx(expected, rel=1e-5)
    total.backward()
    gradient = output.grad[:, -3:].sum(dim=0).numpy()
    np.testing.assert_allclose(gradient, 0.5 - weighted * np.exp(-s), rtol=1e-4)


def test_dynamic_weights_are_the_formula_and_follow_the_slower_loss():
    before, last = np.array([2.0, 1.0, 4.0]), np.array([1.0, 0.9, 4.4])
    expected = 3 * np.exp(last / before / 2) / np.exp(last / before / 2).sum()
    np.testing.assert_allclose(dynamic_weights(before, last), expected)
    task = several(weighting="dynamic")
    given_weights = task.weights.tolist()
    losses = [{"mood_loss": 1.0, "price_loss": 1.0, "tags_loss": 1.0}, {"mood_loss": 0.5, "price_loss": 1.0, "tags_loss": 1.0}]
    task.end_epoch(losses[0])
    assert task.weights.tolist() == given_weights
    task.end_epoch(losses[1])
    np.testing.assert_allclose(task.weights, np.array(given_weights) * dynamic_weights([1.0, 1.0, 1.0], [0.5, 1.0, 1.0]), rtol=1e-6)
    smooth = several(weighting="dynamic", smoothing=0.5)
    for one in losses:
        smooth.end_epoch(one)
    np.testing.assert_allclose(smooth.weights, np.array(given_weights) * dynamic_weights([1.0] * 3, [0.75, 1.0, 1.0]), rtol=1e-6)


def test_gradnorm_makes_gradients_of_unequal_tasks_alike():
    # Two tasks on one shared weight, of which the second has a hundred times the gradient.
    scales = torch.tensor([1.0, 100.0])
    weights = torch.ones(2)
    for _ in range(400):
        weights = gradnorm_weights(weights, scales, torch.ones(2), torch.ones(2), alpha=0.0, lr=0.005)
    sizes = weights * scales
    assert float(sizes.max() / sizes.min()) < 3
    assert float(weights.sum()) == pytest.approx(2)
    # The task that has learned less gets the larger gradient.
    weights = torch.ones(2)
    for _ in range(400):
        weights = gradnorm_weights(weights, torch.ones(2), torch.tensor([0.2, 1.0]), torch.ones(2), alpha=1.0, lr=0.005)
    assert float(weights[1] / weights[0]) == pytest.approx(5, rel=0.1)
    kept = torch.tensor([0.5, 1.5])
    assert torch.equal(gradnorm_weights(kept, torch.tensor([torch.inf, 1.0]), torch.ones(2), torch.ones(2), alpha=1.0, lr=0.1), kept)


def test_scores_and_answers_are_those_of_the_tasks_over_their_samples():
    task, target = learned()
    output = torch.randn(6, task.out_dim, generator=torch.Generator().manual_seed(3))
    metrics = task.metrics()
    values = task.values(output)
    task.update(metrics, values[:4], target[:4])
    task.update(metrics, values[4:], target[4:])
    scores = task.scores(metrics)
    mood, has = task.targets(target)[0]
    right = (task.outputs(output)[0].argmax(dim=1) == mood)[has].float().mean()
    assert float(scores["mood_accuracy"]) == pytest.approx(float(right))
    assert set(scores) <= set(task.metric_names())
    answers = task.answers(values.numpy())
    assert [set(answer) for answer in answers] == [{"mood", "price", "tags"}] * 6
    price = task.in_units(values.numpy())[:, 3]
    assert [answer["price"] for answer in answers] == pytest.approx(price.tolist())
    assert json.loads(task.cell_of(answers[0]))["mood"] == answers[0]["mood"]
    columns = task.columns(values.numpy())
    assert columns["mood_prediction"] == [answer["mood"] for answer in answers]
    assert "mood_p_good" in columns
    classes = task.class_scores(values, target)
    assert {"mood good", "tags a"} <= classes.keys()


def test_its_state_makes_the_same_task():
    task, _ = learned(several(weighting="dynamic"))
    task.end_epoch(dict.fromkeys(task.figure_names, 1.0))
    task.end_epoch(dict(zip(task.figure_names, [0.3, 1.0, 2.0], strict=True)))
    again = Task.from_state(json.loads(json.dumps(task.state())))
    output = torch.randn(6, task.out_dim)
    assert again.names == task.names
    assert torch.equal(again.values(output), task.values(output))
    assert torch.equal(again.weights, task.weights)
    assert again.earlier == task.earlier


def test_an_alignment_is_a_retrieval_beside_another_task():
    parts = [SubTask(Classification(), "mood"), SubTask(Retrieval(dim=3), weight=0.1, head="DualEncoder")]
    task = MultiTask(parts)
    inputs = {"image": ["a", "b", "c", "d", None, "f"], "text": ["x", "y", "x", "z", "w", "v"]}
    cells = task.joined({"mood": MOOD}, {}, inputs)
    task.learn({"train": cells}, column="", on_unseen="error")
    target = torch.from_numpy(task.encode(cells))
    assert task.contrasts
    assert not task.mixable
    output = torch.randn(6, task.out_dim)
    mood, pairs = task.outputs(output)
    pairs[4] = 0  # the head's, of a sample without image
    whole = task.contrast(Pool(output, target, torch.arange(6)))
    one = parts[0].task
    rows = [0, 1, 3, 4, 5]
    expected = one.update_loss(mood[rows], torch.from_numpy(one.encode([MOOD[i] for i in rows]))).mean()
    expected = expected + 0.1 * parts[1].task.loss(pairs, task.targets(target)[1][0]).mean()
    assert float(whole.mean()) == pytest.approx(float(expected), rel=1e-5)
    halves = [task.contrast(Pool(output, target, rows)) for rows in torch.arange(6).split(2)]
    assert torch.allclose(torch.cat(halves), whole)
    task.check_head(PerTask({"image": 4, "text": 4}, task.out_dim, heads=heads_of(task)))


def heads_of(task):
    return [{"head": part.head or "Concat", "args": part.head_args or {}, "out_dim": part.task.out_dim} for part in task.parts]


def test_a_cell_that_one_of_the_tasks_rejects_is_named_with_it():
    task = several()
    cells = task.joined({"mood": ["good", None], "price": ["much", None], "tags": ["a", '["']}, {}, {})
    assert task.check(cells[0]) == "price: label 'much' is not a number"
    assert task.check(cells[1]).startswith("tags: label")
    alone = MultiTask([SubTask(Classification(), "mood"), SubTask(Ordinal(), "stars")])
    assert alone.check(alone.joined({"mood": [None], "stars": [None]}, {}, {})[0]) == "all labels are missing"


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ([SubTask(Classification(), "mood")], {}, "has 1 tasks; expected at least two"),
        ([SubTask(Classification(), "mood"), SubTask(Ordinal(), "mood")], {}, r"tasks\[0\] and tasks\[1\] are both called 'mood'"),
        ([SubTask(Classification(), "a", "x"), SubTask(Ordinal(), "b", "x")], {}, "are both called 'x'; give one of them another name"),
        ([SubTask(Classification()), SubTask(Ordinal(), "b")], {}, r"tasks\[0\] \(Classification\) needs a column"),
        ([SubTask(Retrieval(), "a"), SubTask(Ordinal(), "b")], {}, r"tasks\[0\] \(Retrieval\) reads no column"),
        ([SubTask(Classification(), "a", weight=0.0), SubTask(Ordinal(), "b")], {}, "the weight of 'a' is 0.0; expected a number above 0"),
        ([SubTask(Classification(), "a", head_args={"dim": 2}), SubTask(Ordinal(), "b")], {}, "'a' has head_args but no head"),
        ([SubTask(several(), "a"), SubTask(Ordinal(), "b")], {}, "can't be one of the tasks of another"),
        ([SubTask(Retrieval(), name="a"), SubTask(Retrieval(), name="b")], {}, "needs a task besides Retrieval"),
        (None, {"weighting": "equal"}, "weighting is 'equal'; expected fixed, uncertainty, dynamic or gradnorm"),
        (None, {"temperature": 1.0}, "temperature is an option of weighting=dynamic, but weighting is fixed"),
        (None, {"weighting": "dynamic", "smoothing": 1.0}, "smoothing is 1.0; expected a number from 0 to below 1"),
        (None, {"weighting": "gradnorm", "lr": 0.0}, "lr is 0.0; expected a number above 0"),
        ([SubTask(Classification(), "a"), SubTask(Retrieval())], {"weighting": "gradnorm"}, "gradnorm needs losses of single samples"),
    ],
)
def test_tasks_that_cannot_be_combined_are_rejected(parts, options, message):
    with pytest.raises(UserError, match=message):
        MultiTask(parts or [SubTask(Classification(), "a"), SubTask(Ordinal(), "b")], **options)


def test_heads_that_do_not_fit_a_task_are_rejected():
    task, _ = learned()
    with pytest.raises(UserError, match="needs a head for each task"):
        task.check_head(Concat({"a": 4, "b": 4}, task.out_dim))
    heads = heads_of(task)
    heads[2]["head"] = "ProductOfExperts"
    with pytest.raises(UserError, match="ProductOfExperts treats its outputs as classes of which exactly one is right"):
        task.check_head(PerTask({"a": 4, "b": 4}, task.out_dim, heads=heads))
    with pytest.raises(ValueError, match="but Concat reads pooled, JointTransformer reads embeddings"):
        PerTask({"a": 4, "b": 4}, 4, heads=[{"head": name, "args": {}, "out_dim": 2} for name in ("Concat", "JointTransformer")])
    assert isinstance(DualEncoder({"a": 4, "b": 4}, 8), DualEncoder)


@pytest.mark.parametrize("weighting", ["fixed", "uncertainty"])
def test_of_two_tasks_that_conflict_the_certain_one_wins_under_learned_variances(weighting):
    # Both predict the same number w: one has the targets 1, the other -1 with noise of standard deviation 10.
    task = MultiTask([SubTask(Regression(loss="mse"), "a"), SubTask(Regression(loss="mse"), "b")], weighting=weighting)
    task.target_specs = [(torch.float32, (1,))] * 2
    task.each[0].names, task.each[1].names = ["a"], ["b"]
    noise = 10 * torch.randn(2000, generator=torch.Generator().manual_seed(0))
    target = torch.stack([torch.ones(2000), noise - noise.mean() - 1], dim=1)
    w, s = torch.zeros(1, requires_grad=True), torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([w, s], lr=0.05)
    for _ in range(2000):
        optimizer.zero_grad()
        own = [w.expand(2000, 1), w.expand(2000, 1)]
        output = torch.cat([*own, s.expand(2000, 2)] if weighting == "uncertainty" else own, dim=1)
        task.update_loss(output, target).mean().backward()
        optimizer.step()
    assert w.item() == pytest.approx(0.0 if weighting == "fixed" else 1.0, abs=0.05)
    if weighting == "uncertainty":
        # The variance of the normal distribution that is most likely: the mean squared error.
        assert s.exp()[1].item() == pytest.approx(float((target[:, 1] - w.detach()).square().mean()), rel=0.05)


def test_losses_of_batches_and_of_validation_have_the_mean_of_the_whole_however_targets_are_spread():
    task, target = learned()
    output = torch.randn(6, task.out_dim, generator=torch.Generator().manual_seed(1))
    whole = task.batch_figures(output, target)
    halves = [task.batch_figures(o, t) for o, t in zip(output.split(2), target.split(2), strict=True)]
    for name in task.figure_names:
        assert float(sum(half[name] for half in halves) / 3) == pytest.approx(float(whole[name]), rel=1e-5)
    price, has = task.targets(target)[1]
    assert float(whole["price_loss"]) == pytest.approx(float(task.each[1].loss(task.outputs(output)[1], price)[has].mean()), rel=1e-5)
    plain = MultiTask([SubTask(Classification(), "mood", weight=2.0), SubTask(Regression(), "price")])
    cells = plain.joined({"mood": MOOD, "price": PRICE}, {}, {})
    plain.learn({"train": cells}, column="", on_unseen="error")
    output, target = torch.randn(6, plain.out_dim), torch.from_numpy(plain.encode(cells))
    assert float(plain.plain_loss(output, target).mean()) == pytest.approx(float(plain.update_loss(output, target).mean()), rel=1e-5)


def test_gradnorm_leaves_out_tasks_without_samples_in_an_update():
    weights = torch.tensor([0.5, 1.0, 1.5])
    present = torch.tensor([True, False, True])
    moved = gradnorm_weights(
        weights, torch.tensor([4.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 1.0]), torch.ones(3), alpha=1.0, lr=0.1, present=present
    )
    assert moved[1] == 1.0
    assert float(moved.sum()) == pytest.approx(3.0)
    alone = gradnorm_weights(weights[[0, 2]], torch.tensor([4.0, 1.0]), torch.ones(2), torch.ones(2), alpha=1.0, lr=0.1)
    torch.testing.assert_close(moved[[0, 2]], alone)
    one = torch.tensor([True, False, False])
    assert torch.equal(gradnorm_weights(weights, torch.ones(3), torch.ones(3), torch.ones(3), alpha=1.0, lr=0.1, present=one), weights)


def test_a_head_of_pairs_is_for_retrieval_alone():
    with pytest.raises(UserError, match="DualEncoder embeds pairs, for the task Retrieval; choose another head for Classification"):
        Classification().check_head(DualEncoder({"a": 4, "b": 4}, 10))
    task = MultiTask([SubTask(Classification(), "a"), SubTask(Retrieval(dim=3), head="DualEncoder")])
    task.each[0].names = ["x", "y"]
    heads = heads_of(task)
    heads[1]["args"] = {"matcher": "Concat"}
    with pytest.raises(UserError, match="a matcher needs batches without shared items"):
        task.check_head(PerTask({"a": 4, "b": 4}, 10, heads=heads))


def test_scores_over_ranks_are_not_gathered_twice():
    task, target = learned()
    metrics = task.metrics()
    task.update(metrics, task.values(torch.randn(6, task.out_dim)), target)
    for _, _, of_task in task.metrics_by_task(metrics):
        assert all(not metric.sync_on_compute for metric in of_task.values(copy_state=False))
