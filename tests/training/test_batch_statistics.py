"""Batch normalisation over all devices: as far as it goes without a GPU, which torch's synchronised layers ask for in training."""

import pytest
import torch
import torch.distributed as dist
from timm.layers import SyncBatchNormAct
from torch import nn

from fusion.encoders import Images, TimmImage
from fusion.errors import UserError
from fusion.training.distributed.batch_statistics import SyncStatistics

# Of each way in which timm normalises: plain, with the activation in it.
NAMES = {"resnet10t": nn.SyncBatchNorm, "efficientnet_lite0": SyncBatchNormAct, "regnety_002": SyncBatchNormAct}


@pytest.fixture
def task_of(parts):
    def make(name, *options):
        image = [f"--model.image.init_args.name={name}", "--model.image.init_args.options={}", *options]
        model, data, _ = parts(*image)
        model.build(data)
        return model

    return make


@pytest.mark.parametrize("name", NAMES)
def test_a_converted_encoder_gives_what_it_gave(task_of, name):
    task = task_of(name)
    encoder = task.model.encoders["image"].eval()
    for m in encoder.modules():  # statistics that differ from the initial ones
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.uniform_(-1, 1)
            m.running_var.uniform_(0.5, 2)
    pixels = torch.rand(2, 3, 64, 64)
    names, before = [n for n, _ in task.named_parameters()], encoder(pixels)
    SyncStatistics().apply(task)
    after = task.model.encoders["image"](pixels)
    assert torch.equal(before.tokens, after.tokens)
    assert [n for n, _ in task.named_parameters()] == names
    norms = [m for m in task.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert {type(m) for m in norms} <= {nn.SyncBatchNorm, SyncBatchNormAct}
    assert any(type(m) is NAMES[name] for m in norms)
    assert task.model.encoders["image"].has_synced_statistics


def test_what_is_frozen_holds_its_statistics_after_the_conversion(task_of):
    task = task_of("resnet10t", '--model.freeze={"image.*layer1*": {}}')
    SyncStatistics().apply(task)
    task.train()
    task.freezing.apply(task.model, 0)
    still = {name for name, m in task.model.named_modules() if isinstance(m, nn.SyncBatchNorm) and not m.training}
    assert still
    assert all("layer1" in name for name in still)


def test_a_rank_without_pictures_takes_part_with_none_of_them(monkeypatch):
    """So that the others, which wait for its share of the statistics, forward and backward, get one."""
    counts = []

    def shared(self, x):
        counts.append(len(x))
        return x * self.weight[:, None, None] + self.bias[:, None, None]

    encoder = TimmImage("resnet10t", pretrained=False, image_size=32)
    encoder.body = nn.SyncBatchNorm.convert_sync_batchnorm(encoder.body)
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", shared)
    encoder.train()
    pixels, absent = torch.zeros(1, 3, 32, 32), torch.zeros(4, dtype=torch.bool)
    for images in (
        Images(pixels, absent, torch.zeros(4, dtype=torch.long), any_present=False),
        Images(pixels.expand(4, -1, -1, -1), absent, any_present=False),
    ):
        counts.clear()
        features = encoder(images)
        assert set(counts) == {0}
        assert features.tokens.shape[0] == len(images.pixels)
        assert not features.tokens.any()
        features.tokens.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in encoder.parameters())


def test_it_is_refused_on_a_cpu_before_training(tiny, fit_here):
    with pytest.raises(UserError, match=r"trainer\.sync_batchnorm needs GPUs"):
        fit_here("--recipe", tiny(), "--trainer.sync_batchnorm=true", "--trainer.strategy.class_path=fusion.training.DDP")
    assert not dist.is_initialized()


@pytest.mark.parametrize(("batch", "told"), [(8, "about 2 images"), (64, None)])
def test_the_plan_says_when_statistics_are_of_few_pictures(tiny, fit_here, capsys, batch, told):
    image = ["--model.image.init_args.name=resnet10t", "--model.image.init_args.options={}"]
    fit_here("--recipe", tiny(), *image, f"--data.batch_size={batch}", "--data.shuffle=images", "--trainer.max_steps=1")
    line = [line for line in capsys.readouterr().out.splitlines() if "batch normalisation sees" in line]
    assert bool(line) == bool(told)
    assert told is None or told in line[0]
