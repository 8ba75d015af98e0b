"""Ranks, recalls and losses of retrieval against plain NumPy, and what its task does with pairs."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusion.errors import UserError
from fusion.heads import Concat, DualEncoder
from fusion.tasks import Retrieval
from fusion.tasks.base import Pool
from fusion.tasks.metrics import Pairs, retrieval_ranks, retrieval_scores
from fusion.tasks.metrics import ranks as ranks_module


def ranks_by_sorting(queries, candidates, right):
    """The best place of a right candidate in each query's order."""
    found = []
    for i, query in enumerate(queries):
        order = np.argsort(-(candidates @ query), kind="stable")
        found.append(1 + min(int(np.flatnonzero(order == j)[0]) for j in right[i]))
    return found


@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(1, 4), st.integers(1, 40))
def test_ranks_are_those_of_sorted_scores_in_chunks_of_any_size(seed, images, captions, values):
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(images, 6)).astype(np.float32), rng.normal(size=(images * captions, 6)).astype(np.float32)
    owner = rng.permutation(np.repeat(np.arange(images), captions))
    rows = rng.permutation(len(owner))  # of the manifest
    pairs = Pairs.of(*(torch.from_numpy(x) for x in (left[owner][rows], right[rows], np.stack([owner[rows], rows], axis=1))))
    whole = ranks_module.CHUNK_VALUES
    try:
        ranks_module.CHUNK_VALUES = values
        to_right, to_left = retrieval_ranks(pairs)
    finally:
        ranks_module.CHUNK_VALUES = whole
    assert to_right.tolist() == ranks_by_sorting(left, right, [np.flatnonzero(owner == i) for i in range(images)])
    assert to_left.tolist() == ranks_by_sorting(right, left, [[i] for i in owner])


@pytest.mark.parametrize("value", [0.0, 1.0, torch.nan])
def test_a_model_that_embeds_everything_alike_ranks_last(value):
    pairs = Pairs.of(torch.full((8, 3), value), torch.full((8, 3), value), torch.arange(8)[:, None].expand(8, 2))
    for ranks in retrieval_ranks(pairs):
        assert ranks.tolist() == [8] * 8
    assert retrieval_scores(retrieval_ranks(pairs), ("a", "b"))["recall_5"] == 0


def test_a_hit_is_any_of_several_captions():
    # The image's five captions: the third is the nearest; the nearest of all is the other image's.
    right = torch.tensor([[0.1], [0.2], [0.9], [0.3], [0.4], [1.0]])
    left = torch.ones(6, 1)
    ids = torch.tensor([[0, 0], [0, 1], [0, 2], [0, 3], [0, 4], [1, 5]])
    to_right, _ = retrieval_ranks(Pairs.of(left, right, ids))
    assert to_right.tolist() == [2, 1]


def test_five_thousand_images_and_their_captions_are_ranked_in_seconds_and_little_memory():
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(5000, 256, generator=generator)
    right = torch.randn(25_000, 256, generator=generator)
    pairs = Pairs(left, right, torch.arange(5000).repeat_interleave(5), torch.arange(25_000))
    started = time.process_time()
    retrieval_ranks(pairs)
    assert time.process_time() - started < 20  # on two cores under 10


def numpy_loss(left, right, kind):
    logits = left @ right.T
    if kind == "sigmoid":
        signs = 2 * np.eye(len(left)) - 1
        return np.log1p(np.exp(-signs * logits)).sum(axis=1)
    p_right = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    p_left = np.exp(logits.T) / np.exp(logits.T).sum(axis=1, keepdims=True)
    return -(np.log(np.diag(p_right)) + np.log(np.diag(p_left))) / 2


@pytest.mark.parametrize("kind", ["info_nce", "sigmoid"])
def test_the_loss_of_rows_of_a_pool_is_that_of_the_whole(kind):
    task = Retrieval(dim=4, loss=kind)
    output = torch.randn(7, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = torch.arange(7)[:, None].expand(7, 2)
    whole = task.loss(output, target)
    np.testing.assert_allclose(whole.numpy(), numpy_loss(*np.split(output.numpy(), 2, axis=1), kind), rtol=1e-9)
    parts = [task.contrast(Pool(output, target, rows)) for rows in torch.randperm(7).split(3)]
    assert torch.allclose(torch.cat(parts).sort().values, whole.sort().values)


@pytest.mark.parametrize("kind", ["info_nce", "sigmoid"])
def test_pairs_of_the_same_item_are_no_negatives_and_incomplete_ones_are_left_out(kind):
    task = Retrieval(dim=4, loss=kind)
    output = torch.randn(5, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[0, 0], [1, 1], [2, 2], [2, 3], [4, 4]])  # the fourth has the third's image
    distinct = torch.arange(5)[:, None].expand(5, 2)
    alone = task.loss(output, ids)
    assert not torch.allclose(alone, task.loss(output, distinct))
    without = [0, 1, 2, 4]
    assert torch.allclose(alone[2], task.loss(output[without], distinct[without])[2])
    output[4, 5:] = 0  # no text
    loss = task.loss(output, distinct)
    assert loss[4] == 0
    assert torch.allclose(loss.mean(), task.loss(output[:4], distinct[:4]).mean())


def test_pairs_share_a_split_with_the_others_of_their_left_item():
    task = Retrieval()
    cells = task.pair({"image": ["a", "a", "b", None], "text": ["x", "y", "x", "z"]})
    assert cells[3] is None
    assert task.check(None) == "no image or no text: both are needed for a pair"
    units = task.units(cells)
    assert units[0] == units[1] != units[2]
    assert task.encode(cells).tolist() == [[0, 0], [0, 1], [1, 0], [-1, -1]]


def test_three_inputs_are_paired_by_both_sides_inputs():
    task = Retrieval(left=["text", "facts"])
    cells = task.pair({"image": ["a", "a"], "text": ["x", "x"], "facts": [("1",), ("2",)]})
    assert task.sides == ("text+facts", "image")
    assert task.encode(cells).tolist() == [[0, 0], [1, 0]]


def test_a_set_in_which_all_images_are_one_is_rejected():
    task = Retrieval()
    cells = task.pair({"image": ["a"] * 3, "text": ["x", "y", "z"]})
    with pytest.raises(UserError, match="at least two different items on each side: in the training split all 3 pairs have the same image"):
        task.learn({"train": cells}, column="", on_unseen="error")


@pytest.mark.parametrize(
    ("task", "head", "message"),
    [
        ({}, Concat({"a": 4, "b": 4}, 10), "embeds two sides apart, but the head Concat fuses them: use --model.head=DualEncoder"),
        ({"loss": "sigmoid"}, DualEncoder({"a": 4, "b": 4}, 10), "loss=sigmoid needs a bias of the logits: --model.head.bias=-10"),
        ({}, DualEncoder({"a": 4, "b": 4}, 10, bias=-10), "bias has no effect on loss=info_nce"),
        ({"left": ["b"]}, DualEncoder({"a": 4, "b": 4}, 10), r"left is \['b'\], but the head's left is \['a'\]"),
    ],
)
def test_a_head_that_does_not_fit_the_task_is_rejected(task, head, message):
    with pytest.raises(UserError, match=message):
        Retrieval(**task).check_head(head)


@pytest.mark.parametrize("options", [{"dim": 0}, {"loss": "triplet"}])
def test_options_out_of_range_are_rejected(options):
    with pytest.raises(UserError, match=r"task: (dim|loss) is .*; expected"):
        Retrieval(**options)


def test_the_score_of_chance_is_the_recall_of_a_random_order():
    task = Retrieval(dim=2)
    rng = np.random.default_rng(0)
    cells = task.pair({"image": [str(i // 5) for i in range(50)], "text": [str(i) for i in range(50)]})
    target = torch.from_numpy(task.encode(cells))
    recalls = []
    for _ in range(300):
        images, texts = rng.normal(size=(10, 3)), rng.normal(size=(50, 3))
        pairs = Pairs.of(torch.from_numpy(images[target[:, 0]]), torch.from_numpy(texts), target)
        recalls.append(float(retrieval_scores(retrieval_ranks(pairs), ("a", "b"))["recall_1"]))
    assert np.mean(recalls) == pytest.approx(task.bound([None] * 50, cells), abs=0.02)
