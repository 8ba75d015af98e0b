"""Smaller models of a run: what they keep, what they cost, and which layers are left alone."""

import json
import math

import numpy as np
import pytest
import torch
from tiny_world import SHORT
from torch import nn

import fusion
from fusion.cli.shrink import shrink
from fusion.deploy.int8 import Verdict, layers, prepared, quantised_within
from fusion.deploy.latency import first_samples, latencies
from fusion.deploy.shrinking import shrink_to_int8
from fusion.deploy.split_arrays import SplitArrays, lost
from fusion.errors import UserError
from fusion.packages.runtimes import OnnxRuntime
from fusion.tasks import Classification, MultiTask, Regression, SubTask


@pytest.fixture
def run(tiny, fit_here):
    return fit_here("--recipe", tiny(), *SHORT, "--model.image.init_args.name=test_resnet")


def test_a_run_in_8_bits_is_a_package_whose_report_says_what_it_cost(run, tmp_path, capsys):
    words = [
        "--run",
        str(run.folder),
        "--method",
        "int8",
        "--out",
        str(tmp_path / "small"),
        "--most_lost=0.5",
        "--most_changed=0.5",
        "--seconds=0.1",
    ]
    assert shrink(words) == 0
    printed = capsys.readouterr().out
    assert "layers in 8 bits" in printed
    assert "times smaller than float32 (PyTorch)" in printed
    report = json.loads((tmp_path / "small" / "shrink.json").read_text())
    eager, full, small = report["models"].values()
    assert small["bytes"] < full["bytes"] / 2
    assert set(small["scores"]) == {"val", "test"}
    assert set(small["latency"]) == {"1", "32"}
    assert eager["scores"]["test"][0] == pytest.approx(run.results()["test"]["accuracy"], abs=1e-6)
    assert full["scores"] == {split: pytest.approx(score, abs=1e-6) for split, score in eager["scores"].items()}
    loaded, model = fusion.load(tmp_path / "small"), fusion.load(run.folder)
    picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    raw = {"images": [picture, None, picture], "texts": ["is there a circle", "red?", None]}
    found, expected = loaded.predict(**raw), model.predict(**raw)
    assert 0 < np.abs(found.values - expected.values).max() < 0.1  # rounded, but not another model
    onnx = pytest.importorskip("onnx")
    kinds = {node.op_type for node in onnx.load(str(tmp_path / "small" / "model.onnx")).graph.node}
    assert "MatMulInteger" in kinds
    assert "QuantizeLinear" in kinds


class TwoLayers(nn.Module):
    """A layer of whose inputs one is a thousand times the others, which 8 bits for all of them can't hold, between two even layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(8, 8)
        self.outlier, self.even = nn.Linear(8, 16), nn.Linear(16, 3)
        self.register_buffer("scale", torch.tensor([3000.0] + [1.0] * 7))
        with torch.no_grad():
            self.outlier.weight[:, 0] = 0  # what is large doesn't matter, what is small does

    def forward(self, x):
        return self.even(torch.tanh(self.outlier(torch.tanh(self.stem(x)) * self.scale)))


def test_of_samples_with_several_images_the_timed_and_measured_ones_keep_theirs():
    index = np.arange(6).reshape(3, 2)
    batch = {"image_pixels": np.arange(6), "image_image_index": index, "image_image_mask": index >= 0, "text_ids": np.arange(3)}
    for count in (1, 5):
        first = first_samples([batch], count)
        assert first["text_ids"].tolist() == [0, 1, 2, 0, 1][:count]
        assert (first["image_pixels"][first["image_image_index"]] == index[first["text_ids"]]).all()
        assert first["image_image_mask"].shape == (count, 2)


def test_numbers_that_differ_a_little_are_no_changed_answers():
    mixed = MultiTask([SubTask(Classification(), "mood"), SubTask(Regression(), "price")])
    mixed.learn({"train": mixed.joined({"mood": ["a", "b", "a"], "price": ["1", "2", "5"]}, {}, {})}, column="", on_unseen="error")
    values = np.array([[0.9, 0.1, 0.5], [0.2, 0.8, 0.5]], dtype=np.float32)
    samples = SplitArrays(mixed, [], [None, None])
    assert samples.changed(values + np.float32(1e-6), values) == 0
    assert samples.changed(values[::-1], values) == 1
    assert samples.changed(np.array([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5]], np.float32), values) == 0.5


def test_the_layer_that_costs_is_left_in_32_bits_and_the_others_are_not(tmp_path):
    model, x = TwoLayers().eval(), torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    source, ready, small = (tmp_path / name for name in ("full.onnx", "ready.onnx", "small.onnx"))
    dims = ({0: torch.export.Dim("samples", min=1)},)
    torch.onnx.export(model, (x,), str(source), dynamo=True, external_data=False, input_names=["x"], dynamic_shapes=dims, verbose=False)
    prepared(source, ready)
    arrays = {"x": x.numpy()}
    expected = model(x).detach().numpy()

    def difference(file):
        return float(np.abs(OnnxRuntime(file, ["x"], 1)(arrays) - expected).mean())

    def within(limit):
        return lambda file: Verdict(difference(file) <= limit, 1 - difference(file), "")

    lines = []
    found = quantised_within(ready, small, [arrays], within(0.02), difference, lines.append)
    assert len(layers(ready)) == 3
    assert len(found.excluded) == 1
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(str(ready)).graph
    node = next(node for node in graph.node if node.name == found.excluded[0])
    weight = onnx.numpy_helper.to_array(next(one for one in graph.initializer if one.name == node.input[1]))
    assert 16 in weight.shape
    assert 8 in weight.shape
    assert difference(small) <= 0.02
    assert len(lines) == 2
    assert quantised_within(ready, small, [arrays], within(1e9), difference).excluded == []
    everything = quantised_within(ready, small, [arrays], within(-1.0), difference)
    assert len(everything.excluded) == 3  # nothing helps, so that nothing is quantised
    assert difference(small) < 1e-5


def scored(correct):
    task = Classification()
    task.set_learnt({"names": ["no", "yes"]})
    values = np.array([[0.2, 0.8] if right else [0.8, 0.2] for right in correct], dtype=np.float32)
    return SplitArrays(task, [{"x": values}], ["yes"] * len(correct)), values


def test_intervals_cover_what_they_say():
    samples, values = scored([True] * 80 + [False] * 20)
    low, high = samples.interval(values, "accuracy")
    assert (low, high) == pytest.approx((0.7112, 0.8666), abs=1e-3)  # Wilson's, by his formula
    low, high = samples.interval(values, "log_loss")
    each = np.where(np.arange(100) < 80, -math.log(0.8), -math.log(0.2))
    half = 1.96 * each.std() / 10  # by the central limit theorem
    assert (low, high) == pytest.approx((each.mean() - half, each.mean() + half), abs=0.03)
    assert samples.changed(values, values) == 0
    assert samples.changed(values, values[:, ::-1]) == 1
    assert samples.values(lambda arrays: arrays["x"]).tolist() == values.tolist()


def test_a_loss_of_a_score_that_is_minimised_is_its_increase():
    classes, numbers = Classification(), Regression()
    assert lost(classes, 0.9, 0.88) == pytest.approx(0.02)
    assert lost(numbers, 2.0, 2.5) == pytest.approx(0.25)


def test_latencies_are_measured_in_turns():
    order = []
    found = latencies({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0.01, rounds=3)
    assert set(found) == {"a", "b"}
    turns = [one for i, one in enumerate(order) if i == 0 or order[i - 1] != one]
    assert turns == ["a", "b"] * 4  # warm-up, then three rounds
    assert all(0 < one.p50 <= one.p99 for one in found.values())


def test_mistakes_are_named(run, tmp_path):
    with pytest.raises(UserError, match=r"the run's data has no split 'vall'\. Did you mean val"):
        shrink_to_int8(run.folder, tmp_path / "p", calibration_split="vall")
    with pytest.raises(UserError, match=r"--calibration_split test: layers would be chosen by the samples that judge the result"):
        shrink_to_int8(run.folder, tmp_path / "p", calibration_split="test")
    with pytest.raises(UserError, match=r"--most_lost is 1.5; expected from 0 to below 1"):
        shrink_to_int8(run.folder, tmp_path / "p", most_lost=1.5)
    with pytest.raises(UserError, match=r"expected from 0 to below 1"):
        shrink(["--run", str(run.folder), "--method=int8", "--out", str(tmp_path / "p"), "--most_lost=-1"])
    assert not (tmp_path / "p").exists()
