"""What a GPU would be given: run on tensors that have CUDA's device and shapes and no memory (torch's FakeTensorMode), on any machine.

A tensor that was left on the CPU, and an operation that has no CUDA kernel's rule, raise here as they would there. Values don't exist, and
neither do backward passes: those wait for a card (scripts/benchmark.py gpu).
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from fusion.data.samples import Batch
from fusion.encoders import Images, Texts, TimmImage, TransformersText
from fusion.features import Features
from fusion.heads.registry import HEADS
from fusion.model import FusionModel
from fusion.tasks import Classification
from fusion.training import Mixing, Muon
from fusion.training.distributed.sign_compression import SignCompression
from fusion.training.mixing import Box, Mixer


@pytest.fixture
def fake_cuda():
    with FakeTensorMode() as mode:
        yield mode


def on_cpu(state):
    return tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), state)


def updated(optimizer, parameters):
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


OPTIMIZERS = {
    "Muon": lambda groups: Muon(groups, lr=0.1),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.1, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimiser_goes_on_from_its_checkpoint_on_the_device_of_the_weights(fake_cuda, name):
    def made():
        layer = torch.nn.Linear(8, 4, device="cuda")
        return list(layer.parameters()), OPTIMIZERS[name](layer.parameters())

    parameters, optimizer = made()
    held = on_cpu(updated(optimizer, parameters).state_dict())
    parameters, again = made()
    again.load_state_dict(held)
    updated(again, parameters)
    states = [value for state in again.state.values() for value in state.values()]
    assert {value.device.type for value in states} == {"cuda"}


def test_muons_checkpoints_of_before_its_key_go_on_too(fake_cuda):
    layer = torch.nn.Linear(8, 4, device="cuda")
    optimizer = updated(Muon(layer.parameters(), lr=0.1), list(layer.parameters()))
    held = on_cpu(optimizer.state_dict())
    for group in held["param_groups"]:
        del group["fused"]
    optimizer.load_state_dict(held)
    assert {value.device.type for state in optimizer.state.values() for value in state.values()} == {"cuda"}


def test_what_was_left_to_be_said_goes_where_the_weights_are(fake_cuda):
    layer = torch.nn.Linear(4, 6)
    named = dict(layer.named_parameters())
    compression = SignCompression()
    compression.encode_with_feedback([layer.weight], torch.ones(1, 6, 4))
    compression.encode_with_feedback([layer.bias], torch.ones(1, 6))
    state, residuals = on_cpu(compression.state(named)), compression.residual_state(named)
    resumed = SignCompression()
    there = torch.nn.Linear(4, 6, device="cuda")
    resumed.load_state(state, residuals, dict(there.named_parameters()))
    sides = [axes for both in resumed.axes.values() for axes in both if axes is not None]
    tensors = [*resumed.residual.values(), *(tensor for axes in sides for tensor in (axes.moment, axes.basis))]
    assert len(tensors) == 6
    assert {tensor.device.type for tensor in tensors} == {"cuda"}
    resumed.encode_with_feedback([there.weight], torch.ones(1, 6, 4, device="cuda"))


# A value that Python would have to read does not exist here, and asking for it raises: what runs waits for no device.


@pytest.mark.parametrize("name", HEADS)
def test_a_head_runs_on_the_device_and_asks_it_for_nothing(fake_cuda, name):
    with torch.device("cuda"):
        head = HEADS[name]({"text": 32, "image": 48}, 5, dim=64)
        lengths = torch.arange(1, 9)
        mask, rows = torch.arange(7)[None] < lengths[:, None], torch.arange(8) % 3
        text, image = torch.randn(8, 7, 32), torch.randn(3, 49, 48)
        there = (torch.arange(8) % 4 > 0)[:, None].expand(-1, 49)
        given = {"text": Features(text, mask, text.mean(1)), "image": Features(image, there, image.mean(1), rows)}
    if name == "LevelWeighted":
        given = {modality: [features] for modality, features in given.items()}
    output = head(given).output
    assert output.device.type == "cuda"
    assert output.shape == (8, 5)


BERT = {
    "model_type": "bert",
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def made(name, head):
    """Built with values, on the CPU, as training does."""
    encoders = {"image": TimmImage(name, pretrained=False, image_size=64), "text": TransformersText(config=BERT)}
    return FusionModel.build(encoders, HEADS[head], 5)


@pytest.mark.parametrize("head", ["CrossAttention", "JointTransformer", "LevelWeighted", "Gated", "LogitMean"])
@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
def test_a_whole_model_runs_on_the_device_and_asks_it_for_nothing(name, head, padded):
    model = made(name, head).train()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in model.modules():
            for of_kind in (module._parameters, module._buffers):
                for key, tensor in of_kind.items():
                    if tensor is not None:
                        moved = mode.from_tensor(tensor.detach()).cuda()
                        of_kind[key] = torch.nn.Parameter(moved, tensor.requires_grad) if of_kind is module._parameters else moved
        with torch.device("cuda"):
            pixels = torch.zeros(3, 3, 64, 64, dtype=torch.uint8)
            images = Images(pixels, torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.long), any_present=True)
            texts = Texts(torch.ones(4, 6, dtype=torch.long), torch.ones(4, 6, dtype=torch.bool), full=not padded)
        output = model({"image": images, "text": texts}).output
    assert output.device.type == "cuda"
    assert output.shape == (4, 5)


@pytest.mark.parametrize("several", [False, True], ids=["one image", "several"])
@pytest.mark.parametrize("box", [None, Box(1, 3, 0, 2)], ids=["mixup", "CutMix"])
def test_a_batch_is_mixed_on_the_device_which_is_asked_for_nothing(fake_cuda, monkeypatch, box, several):
    task = Classification()
    task.learn({"train": ["a", "b"]}, column="label", on_unseen="error")
    mixer = Mixer(Mixing(mixup=1.0), task)
    monkeypatch.setattr(mixer, "draw", lambda inputs: (box is not None, 0.7, None if box is None else {"image": box}))
    with torch.device("cuda"):
        shown = torch.ones(4, 2, dtype=torch.bool)
        index = torch.zeros(4, 2, dtype=torch.long)
        pixels = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
        image = Images(pixels, shown[:, 0], index, image_mask=shown) if several else Images(pixels, shown[:, 0], index[:, 0])
        text = Texts(torch.ones(4, 6, dtype=torch.long), torch.ones(4, 6, dtype=torch.bool))
        batch = Batch({"image": image, "text": text}, torch.zeros(4, dtype=torch.long), torch.arange(4))
        output = torch.zeros(4, 2)
    mixed = mixer.mix(batch)
    figures = mixer.figures(lambda target: task.batch_figures(output, target), mixed)
    loss = task.of_mixture(task.loss, output, mixed.target, mixed.mixture)
    found = [*mixed.mixture, mixed.inputs["image"].pixels, loss, *figures.values(), mixer.sums["lesser"]]
    assert {tensor.device.type for tensor in found} == {"cuda"}
    assert mixed.inputs["image"].pixels.shape == (8 if several else 4, 3, 8, 8)
