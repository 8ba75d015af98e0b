"""Muon: hidden matrices move by orthogonal steps, everything else as with AdamW."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fusion.encoders import TransformersText
from fusion.heads import Unimodal
from fusion.model import FusionModel
from fusion.training import Muon
from fusion.training.optim.groups import parameter_groups
from fusion.training.optim.muon import orthogonal


def quintic(s: np.ndarray) -> np.ndarray:
    """Five rounds of Jordan's polynomial, on the singular values themselves."""
    s = s / (np.linalg.norm(s) + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (1, 5)])
def test_a_matrix_keeps_its_singular_vectors_and_its_values_come_near_one(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    for given, found in zip(matrices.double().numpy(), orthogonal(matrices).numpy(), strict=True):
        u, s, vt = np.linalg.svd(given, full_matrices=False)
        np.testing.assert_allclose(found, u * quintic(s) @ vt, atol=1e-4)
    assert float((torch.linalg.svdvals(orthogonal(matrices)) - 1).abs().max()) < 0.4
    assert (orthogonal(torch.zeros(1, *shape)) == 0).all()


def test_its_cost_is_what_its_docstring_says() -> None:
    """From which batch it is at most 5 % of an update of ViT-B/16 (224 pixels) and BERT-base (64 tokens), all products counted."""

    def operations(rows: int, columns: int) -> int:
        low, high = sorted((rows, columns))
        return 20 * low**2 * high + 10 * low**3

    for shape in ((6, 6), (4, 9), (9, 4)):
        with FlopCounterMode(display=False) as counted:
            orthogonal(torch.randn(1, *shape))
        assert counted.get_total_flops() == operations(*shape)
    square, wide = operations(768, 768), operations(768, 3072)
    muon = 12 * (operations(2304, 768) + square + 2 * wide) + 12 * (4 * square + 2 * wide)
    pair = 3 * 2 * (17.58e9 + 12 * (64 * (4 * 768**2 + 2 * 768 * 3072) + 2 * 64**2 * 768))
    assert muon == pytest.approx(3.2e12, rel=0.02)
    assert muon / (0.05 * pair) == pytest.approx(460, rel=0.02)


def test_a_hidden_matrix_moves_by_the_published_formula() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 6))
    optimizer = Muon([weight], lr=0.02, weight_decay=0.1, momentum=0.9)
    expected, momentum = weight.detach().double().numpy().copy(), np.zeros((4, 6))
    for _ in range(3):
        weight.grad = torch.randn(4, 6)
        gradient = weight.grad.double().numpy()
        momentum = 0.9 * momentum + 0.1 * gradient
        u, s, vt = np.linalg.svd(0.1 * gradient + 0.9 * momentum, full_matrices=False)
        expected = (1 - 0.02 * 0.1) * expected - 0.02 * 0.2 * np.sqrt(6) * (u * quintic(s) @ vt)
        optimizer.step()
    np.testing.assert_allclose(weight.detach().numpy(), expected, atol=1e-5)


def test_a_step_is_as_large_as_the_learning_rate_of_adamw_makes_it_whatever_the_shape() -> None:
    """Liu et al. (2025): root mean square 0.2 * lr."""
    torch.manual_seed(0)
    for shape in ((64, 64), (16, 128), (128, 16), (8, 4, 3, 3)):
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = torch.randn(shape)
        Muon([weight], lr=0.01, weight_decay=0.0).step()
        assert float(weight.detach().square().mean().sqrt()) == pytest.approx(0.2 * 0.01, rel=0.25), shape


def test_what_is_not_hidden_moves_as_with_adamw() -> None:
    torch.manual_seed(0)
    one = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4))
    other = copy.deepcopy(one)
    options = {"lr": 0.01, "betas": (0.9, 0.98), "weight_decay": 0.1}
    optimizers = Muon([{"params": one.parameters(), "hidden": False}], **options), torch.optim.AdamW(other.parameters(), **options)
    for _ in range(4):
        for module, optimizer in zip((one, other), optimizers, strict=True):
            optimizer.zero_grad()
            module(torch.tensor([0, 2, 2])).sin().sum().backward()
            optimizer.step()
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_it_goes_on_from_its_state_as_if_never_interrupted() -> None:
    def steps(module: nn.Module, optimizer: Muon, seeds: range) -> None:
        for seed in seeds:
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6))
    optimizer = Muon(whole.parameters())
    steps(whole, optimizer, range(3))
    half, state = copy.deepcopy(whole), copy.deepcopy(optimizer.state_dict())
    steps(whole, optimizer, range(3, 6))
    again = Muon(half.parameters())
    again.load_state_dict(state)
    steps(half, again, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), half.parameters(), strict=True))


def test_embeddings_and_output_layers_are_not_hidden_and_everything_trains_once(parts) -> None:
    model, data, _ = parts()
    model.build(data)
    names = {p: name for name, p in model.model.named_parameters()}
    groups = parameter_groups(model.model)
    hidden = {names[p] for group in groups if group["hidden"] for p in group["params"]}
    assert {name for name in names.values() if "embeddings" in name or "classifier" in name}.isdisjoint(hidden)
    assert any("patch_embed.proj" in name for name in hidden)
    assert any("attention.self.query" in name for name in hidden)
    (table,) = (name for name in names.values() if "pos_embed" in name)
    assert table not in hidden
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(names)


@pytest.mark.parametrize(("option", "value"), [("lr", -1.0), ("momentum", 1.0), ("betas", (0.9, 1.0))])
def test_an_option_out_of_range_is_refused_by_name(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"Muon: {option}"):
        Muon([nn.Parameter(torch.ones(2, 2))], **{option: value})


def test_a_hidden_matrix_as_wide_as_there_are_classes_stays_hidden() -> None:
    shape = {"hidden_size": 12, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 12}
    encoder = TransformersText(config={"model_type": "bert", "vocab_size": 20} | shape)
    model = FusionModel.build({"text": encoder}, partial(Unimodal, dim=12), 12)
    names = {p: name for name, p in model.named_parameters()}
    hidden = {names[p] for group in parameter_groups(model) if group["hidden"] for p in group["params"]}
    assert "encoders.text.body.encoder.layer.0.attention.self.query.weight" in hidden
    assert "head.decide.1.weight" in hidden
    assert "head.decide.4.weight" not in hidden
