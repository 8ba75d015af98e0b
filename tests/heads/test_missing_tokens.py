"""Learned tokens of missing modalities: an option that every head of tokens takes, and what it changes."""

import inspect
from itertools import product
from typing import Any

import pytest
import torch
from small_heads import COUNTS, DIMS, OUT, SMALL, batch_of, run, small, smudged, whole
from torch.nn.functional import cross_entropy

from fusion.features import Features
from fusion.heads import FusionHead
from fusion.heads.missing_tokens import MissingTokens, pattern_rows
from fusion.heads.registry import HEADS

TAKING = [name for name in HEADS if HEADS[name].stage in ("tokens", "embeddings")]
THREE = DIMS | {"c": 5}
taking = pytest.mark.parametrize("name", TAKING)


def learning(name: str, dims: dict[str, int] = DIMS, **more: Any) -> FusionHead:
    """The head with tokens as large as features, so that they show."""
    torch.manual_seed(0)
    head = small(name)(dims, OUT, missing="learned", **more).double().eval()
    with torch.no_grad():
        for table in tables(head).values():
            torch.nn.init.normal_(table)
        for parameter in head.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return head


def tables(head: FusionHead) -> dict[str, torch.Tensor]:
    assert isinstance(head.missing_tokens, MissingTokens)
    return {name: table.weight for name, table in head.missing_tokens.tokens.items()}


def dims_of(name: str) -> dict[str, int]:
    return DIMS if HEADS[name].most_modalities == 2 else THREE


def patterns(dims: dict[str, int]) -> dict[str, Features]:
    """One sample of each pattern of presence, the last with all."""
    torch.manual_seed(2)
    present = torch.tensor(list(product([False, True], repeat=len(dims))))
    return {m: whole(present[:, k, None] & torch.ones(1, COUNTS[m], dtype=torch.bool), dim) for k, (m, dim) in enumerate(dims.items())}


def test_every_head_of_tokens_takes_the_option_and_no_other_does() -> None:
    assert [name for name in HEADS if "missing" in inspect.signature(HEADS[name]).parameters] == TAKING


@taking
def test_a_sample_scores_as_one_that_had_the_learned_token_of_its_pattern(name: str) -> None:
    """Against the head without the option, given the tokens by hand."""
    dims = dims_of(name)
    head, features = learning(name, dims), patterns(dims)
    plain = small(name)(dims, OUT).double().eval()
    plain.load_state_dict({key: value for key, value in head.state_dict().items() if not key.startswith("missing_tokens")})
    expected = []
    for sample in range(2 ** len(dims)):
        has = {m: bool(f.present[sample]) for m, f in features.items()}
        given = {}
        for m, f in features.items():
            row = sum(2**k for k, other in enumerate(other for other in dims if other != m) if has[other])
            tokens = f.tokens[sample] if has[m] else tables(head)[m][row, None]
            given[m] = Features(tokens[None], torch.ones(1, len(tokens), dtype=torch.bool), f.pooled[sample, None])
        expected.append(plain(given).output[0])
    torch.testing.assert_close(head(features).output, torch.stack(expected), atol=1e-10, rtol=0)


@taking
def test_a_token_gets_a_gradient_exactly_where_its_pattern_occurs(name: str) -> None:
    dims = dims_of(name)
    head, features = learning(name, dims), patterns(dims)
    names = list(dims)
    for sample in range(2 ** len(dims)):
        head.zero_grad()
        one = {m: Features(*(x[sample : sample + 1] for x in f[:3])) for m, f in features.items()}
        head(one).output.sin().sum().backward()
        for m, table in tables(head).items():
            assert table.grad is not None
            touched = (table.grad != 0).any(dim=1).nonzero().flatten().tolist()
            others = sum(2**k for k, other in enumerate(n for n in names if n != m) if one[other].present)
            assert touched == ([] if one[m].present else [others]), (sample, m)


@taking
def test_two_patterns_that_lack_the_same_modality_have_tokens_of_their_own(name: str) -> None:
    dims = dims_of(name)
    head, features = learning(name, dims), patterns(dims)
    before = head(features).output
    with torch.no_grad():
        tables(head)["b"][1].neg_()  # lacks b, and has a alone of the others
    changed = (head(features).output != before).any(dim=1)
    only_a = [f.present.tolist() for f in features.values()]
    assert changed.tolist() == [place == (True, *[False] * (len(dims) - 1)) for place in zip(*only_a, strict=True)]


@taking
def test_what_stands_under_a_false_mask_and_in_other_samples_changes_nothing(name: str) -> None:
    head, features = learning(name, unimodal=True), batch_of(DIMS)
    output, gradients = run(head, features)
    for junk in (None, float("nan"), float("inf")):
        other, other_gradients = run(head, smudged(features, junk))
        assert torch.equal(other, output)
        assert all(torch.equal(other_gradients[key], gradient) for key, gradient in gradients.items())
    for row in range(4):
        alone = head({m: Features(*(x[row : row + 1] for x in f[:3])) for m, f in features.items()}).output
        torch.testing.assert_close(alone[0], output[row], atol=1e-10, rtol=0)


@taking
def test_samples_with_everything_are_scored_as_without_the_option_also_where_all_are_known_to_be_real(name: str) -> None:
    head = learning(name)
    plain = small(name)(DIMS, OUT).double().eval()
    plain.load_state_dict({key: value for key, value in head.state_dict().items() if not key.startswith("missing_tokens")})
    features = {m: whole(torch.ones(2, COUNTS[m], dtype=torch.bool), dim) for m, dim in DIMS.items()}
    assert torch.equal(head(features).output, plain(features).output)
    full = {m: f._replace(full=True) for m, f in features.items()}
    head.zero_grad()
    head(full).output.sum().backward()
    torch.testing.assert_close(head(full).output, plain(features).output, atol=1e-10, rtol=0)
    assert all(table.grad is not None and (table.grad == 0).all() for table in tables(head).values())  # an error under DDP if None


@taking
def test_the_default_has_the_parameters_and_the_start_that_it_had(name: str) -> None:
    torch.manual_seed(0)
    default = HEADS[name](DIMS, OUT, **SMALL.get(name, {}))
    torch.manual_seed(0)
    learned: FusionHead = HEADS[name](DIMS, OUT, **SMALL.get(name, {}), missing="learned")  # type: ignore[call-arg]
    assert default.missing_tokens is None
    added = learned.state_dict().keys() - default.state_dict().keys()
    assert added == {f"missing_tokens.tokens.{m}.weight" for m in DIMS}
    assert learned.init_args["missing"] == "learned"
    again = type(learned)(DIMS, OUT, **learned.init_args)
    again.load_state_dict(learned.state_dict())
    assert torch.equal(again.eval()(patterns_float := single(patterns(DIMS))).output, learned.eval()(patterns_float).output)


def single(features: dict[str, Features]) -> dict[str, Features]:
    return {m: Features(f.tokens.float(), f.mask, f.pooled.float()) for m, f in features.items()}


def test_a_head_learns_what_only_the_pattern_of_missing_modalities_tells() -> None:
    """The features are noise; which of two classes depends on the two modalities that a sample has."""
    torch.manual_seed(0)
    head = HEADS["CrossAttention"](THREE, 2, dim=16, depth=1, num_heads=2, missing="learned")  # type: ignore[call-arg]
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(60):
        absent = torch.randint(0, 3, (64,))
        masks = {m: (absent != k)[:, None].expand(-1, COUNTS[m]) for k, m in enumerate(THREE)}
        features = {m: whole(masks[m], dim, torch.float32) for m, dim in THREE.items()}
        optimizer.zero_grad()
        loss = cross_entropy(head(features).output, (absent == 1).long())
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1


def test_there_are_as_many_tokens_as_patterns_that_lack_a_modality_and_too_many_modalities_are_rejected() -> None:
    tokens = MissingTokens("Perceiver", THREE)
    assert {name: tuple(table.weight.shape) for name, table in tokens.tokens.items()} == {"a": (4, 4), "b": (4, 6), "c": (4, 5)}
    present = torch.tensor(list(product([False, True], repeat=3)))
    used = {(m, int(row[i])) for m, row in enumerate(pattern_rows(present)) for i in range(8) if not present[i, m]}
    assert used == set(product(range(3), range(4)))
    with pytest.raises(ValueError, match=r"Perceiver: missing is 'learned' for 9 modalities, which have 511 patterns.*at most 8.*'masked'"):
        HEADS["Perceiver"]({f"m{k}": 4 for k in range(9)}, OUT, dim=8, missing="learned")  # type: ignore[call-arg]


@taking
def test_another_treatment_of_missing_modalities_is_rejected_listing_those_there_are(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: missing is 'zero'; expected masked or learned"):
        HEADS[name](DIMS, OUT, missing="zero")  # type: ignore[call-arg]
