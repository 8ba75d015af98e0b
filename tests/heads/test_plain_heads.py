"""The plain formulations that the benchmark compares with compute what the heads compute; and the benchmark's own measures."""

import pytest
import torch
from small_heads import DIMS, batch_of, smudged

from fusion.benchmarks.heads import alternate, peak_bytes
from fusion.benchmarks.plain_heads import plain_output
from fusion.cli.benchmark import benchmark
from fusion.errors import UserError
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
    features = smudged(batch_of(DIMS, dtype=torch.float32), float("nan"))  # some lack a modality, most have padding
    given: dict[str, Features | list[Features]] = {m: [f, f] for m, f in features.items()} if levels else dict(features)
    torch.testing.assert_close(plain_output(head, given), head(given).output, atol=2e-5, rtol=1e-4)


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
    found = alternate([lambda: calls.append("a"), lambda: calls.append("b")], rounds=2)
    assert [len(times) for times in found] == [2, 2]
    assert calls.count("a") == calls.count("b") > 2


def test_the_benchmark_prints_a_row_for_each_head_that_matches(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark(["heads", "--heads=Lo*", "--batch=2", "--text=3", "--image=4", "--width=8", "--rounds=1"]) == 0
    printed = capsys.readouterr().out
    for name in ("LowRankTensor", "LogitMean"):
        (row,) = [line for line in printed.splitlines() if line.startswith(name)]
        parameters, *measured = row.removeprefix(name).split()
        head = HEADS[name]({"text": 8, "image": 8}, 100)
        assert int(parameters.replace(",", "")) == sum(p.numel() for p in head.parameters())
        assert len(measured) == 6
        assert all(float(cell) > 0 for cell in measured)


def test_the_benchmark_refuses_a_pattern_that_no_head_matches() -> None:
    with pytest.raises(UserError, match=r"no head matches 'Gatd'\. Did you mean Gated"):
        benchmark(["heads", "--heads=Gatd"])


def test_the_benchmark_hands_options_to_the_heads_and_refuses_those_that_they_lack(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["heads", "--heads=LowRankTensor", "--batch=2", "--text=3", "--image=4", "--width=8", "--rounds=1"]
    parameters = []
    for rank in (1, 3):
        assert benchmark([*small, f'--options={{"rank": {rank}}}']) == 0
        parameters.append(int(capsys.readouterr().out.splitlines()[-1].split()[1].replace(",", "")))
    assert parameters[0] < parameters[1]
    with pytest.raises(UserError, match="rnk"):
        benchmark([*small, '--options={"rnk": 3}'])


@pytest.mark.parametrize("options", ['{"adjacency": "mlp"}', '{"nodes": "pooled"}'])
def test_the_benchmark_compares_with_nothing_that_computes_something_else(options: str) -> None:
    with pytest.raises(UserError, match="doesn't know these options"):
        benchmark(
            ["heads", "--heads=AdaptiveGraph", "--batch=2", "--text=3", "--image=4", "--width=8", "--rounds=1", f"--options={options}"]
        )
