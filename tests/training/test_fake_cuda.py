"""What a GPU would be given: run on tensors that have CUDA's device and shapes and no memory (torch's FakeTensorMode), on any machine.

A tensor that was left on the CPU, and an operation that has no CUDA kernel's rule, raise here as they would there. Values don't exist, and
neither do backward passes: those wait for a card (scripts/benchmark.py gpu).
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from fusion.training import Muon


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
