"""The encoder of tables: its tokens against the paper's formula, masks, levels, state."""

import numpy as np
import pytest
import torch

from fusion.encoders import Columns, TableColumns
from fusion.encoders.base import Encoder
from fusion.errors import UserError
from fusion.heads import CrossAttention, JointTransformer, LevelWeighted
from fusion.inputs import Mixture
from fusion.model import FusionModel


def encoder(seed=0, **options):
    torch.manual_seed(seed)
    return TableColumns(**{"dim": 8, "heads": 2, "depth": 2, "numbers": 2, "cardinalities": [3, 4]} | options)


def columns(mask=None):
    mask = torch.ones(3, 4, dtype=torch.bool) if mask is None else mask
    return Columns(torch.randn(3, 2, generator=torch.Generator().manual_seed(1)), torch.tensor([[0, 3], [2, 0], [1, 1]]), mask)


def test_tokens_are_those_of_the_paper():
    made, x = encoder(), columns()
    weight, bias, table = (p.detach().double().numpy() for p in (made.tokens.weight, made.tokens.bias, made.tokens.categories.weight))
    found = made.embed(x).tokens.detach().numpy()
    for b in range(3):
        expected = [x.numbers[b, j].item() * weight[j] + bias[j] for j in range(2)]
        expected += [table[x.categories[b, 0]] + bias[2], table[3 + x.categories[b, 1]] + bias[3]]
        assert np.allclose(found[b], np.stack(expected), atol=1e-6)


def test_what_stands_in_a_missing_cell_changes_nothing():
    made = encoder().eval()
    mask = torch.tensor([[True, False, True, True], [False, True, True, False], [False] * 4])
    x = columns(mask)
    other = x._replace(numbers=x.numbers.masked_fill(~mask[:, :2], 1e4), categories=x.categories.masked_fill(~mask[:, 2:], 2))
    a, b = made(x), made(other)
    assert torch.allclose(a.tokens[mask], b.tokens[mask], atol=1e-6)
    assert torch.allclose(a.pooled, b.pooled, atol=1e-6)
    assert a.pooled[2].abs().sum() == 0
    loss = made.train()(x).pooled.square().sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in made.parameters() if p.grad is not None)


def test_rows_do_not_see_each_other_and_masks_that_hide_nothing_are_left_out():
    made, x = encoder().eval(), columns()
    whole = made(x).tokens
    assert torch.allclose(whole, made(x._replace(full=True)).tokens, atol=1e-6)
    one = Columns(x.numbers[1:2], x.categories[1:2], x.mask[1:2])
    assert torch.allclose(whole[1:2], made(one).tokens, atol=1e-6)


def test_levels_are_the_tokens_after_each_block():
    made, x = encoder().eval(), columns()
    first, last = made.levels(x, [0, -1])
    tokens = made.tokens(x)
    assert torch.allclose(first.tokens, made.blocks[0](tokens, x.mask), atol=1e-6)
    assert torch.allclose(made.norm(last.tokens), made(x).tokens, atol=1e-6)
    assert made.level_dims([0, 1]) == [8, 8]
    with pytest.raises(UserError, match="no depth 2"):
        made.levels(x, [2])
    with pytest.raises(UserError, match="no levels"):
        encoder(depth=0).level_dims([0])


def test_an_encoder_is_built_again_from_its_spec():
    made = encoder(dropout=0.1, frozen=True)
    again = TableColumns(**made.spec())
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(columns()).tokens, made(columns()).tokens)
    assert not any(p.requires_grad for p in again.parameters())


def test_activations_computed_again_give_the_same_gradients():
    made, x = encoder(), columns()
    made(x).pooled.sum().backward()
    expected = [p.grad.clone() for p in made.parameters()]
    made.zero_grad()
    made.checkpoint_activations()
    made(x).pooled.sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(made.parameters(), expected, strict=True))


@pytest.mark.parametrize("head", [CrossAttention, JointTransformer, LevelWeighted])
def test_heads_read_columns_like_words(head):
    model = FusionModel.build({"one": encoder(), "other": encoder(1)}, head, 3)
    assert isinstance(model.encoders["one"], Encoder)
    mask = torch.tensor([[True] * 4, [False] * 4, [True, False, True, False]])
    output = model({"one": columns(mask), "other": columns()}).output
    assert output.shape == (3, 3)
    output.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("stage", ["embeddings", "levels", "tokens"])
def test_rows_are_mixed_cell_by_cell(stage):
    made, x = encoder(), columns()
    made.check_mixing(stage)

    def read(batch, weight=None):
        mixture = None if weight is None else Mixture(torch.tensor([1, 2, 0]), torch.tensor(weight))
        found = made.read(batch._replace(mixture=mixture), stage, [0])
        return found[0] if isinstance(found, list) else found

    assert torch.allclose(read(x, 0.0).tokens, read(x).tokens[[1, 2, 0]], atol=1e-6)
    half = read(x, 0.5).tokens
    assert not torch.allclose(half, read(x).tokens, atol=1e-4)
    averaged = read(x._replace(numbers=(x.numbers + x.numbers[[1, 2, 0]]) / 2, categories=x.categories[[0, 0, 0]])).tokens
    same = read(x._replace(categories=x.categories[[0, 0, 0]]), 0.5).tokens  # numbers alone differ, whose tokens are linear
    assert torch.allclose(same, averaged, atol=1e-5)


@pytest.mark.parametrize("options", [{"dim": 7}, {"depth": -1}, {"dropout": 1.0}, {"heads": 0}])
def test_options_out_of_range_are_rejected(options):
    with pytest.raises(UserError, match="table encoder"):
        encoder(**options)
