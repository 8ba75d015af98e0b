"""The plain formulations that the benchmark compares with compute what the heads compute; and the benchmark's own measures."""

import pytest
import torch
from test_contract import DIMS, whole

from fusion.cli.benchmark_heads import peak_bytes, taking_turns
from fusion.cli.plain_heads import PLAIN
from fusion.features import Features
from fusion.heads.registry import HEADS


@pytest.mark.parametrize("name", HEADS)
def test_a_plain_formulation_answers_as_its_head(name: str) -> None:
    torch.manual_seed(0)
    levels = HEADS[name].stage == "levels"
    head = HEADS[name]({m: [dim] * 2 for m, dim in DIMS.items()} if levels else DIMS, 3, dim=8).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    features = {m: whole(torch.tensor([[True] * 4, [True, True, False, False]]), dim, torch.float32) for m, dim in DIMS.items()}
    given: dict[str, Features | list[Features]] = {m: [f, f] for m, f in features.items()} if levels else dict(features)
    plain = PLAIN[HEADS[name].__module__.rpartition(".")[2]]
    torch.testing.assert_close(plain(head, given), head(given).output, atol=2e-5, rtol=1e-4)


def test_peak_memory_is_what_is_held_at_once() -> None:
    x = torch.randn(1000, 500)

    def two_at_once() -> None:
        y = x + 1
        y = y * 2  # the first is freed only then
        del y
        x.exp()

    assert peak_bytes(two_at_once) == pytest.approx(2 * 4 * 1000 * 500, rel=0.01)


def test_both_ways_are_timed_in_every_round() -> None:
    calls: list[str] = []
    found = taking_turns([lambda: calls.append("a"), lambda: calls.append("b")], rounds=2)
    assert [len(times) for times in found] == [2, 2]
    assert calls.count("a") == calls.count("b") > 2
