"""Batch normalisation over all devices of a run."""

from typing import Any

from lightning.pytorch.plugins import LayerSync
from timm.layers import convert_sync_batchnorm
from torch import nn


class SyncStatistics(LayerSync):
    """Statistics over the pictures of all ranks, for every kind of batch normalisation that timm has: torch's own conversion drops the
    activation that BatchNormAct2d applies (EfficientNet, RegNet, MobileNetV3).

    What is frozen holds its statistics as before. A rank whose batch has no picture takes part with none (`TimmImage.encode`).
    """

    def apply(self, model: Any) -> nn.Module:
        """model: a Task, built."""
        for name, encoder in model.model.encoders.items():
            model.model.encoders[name] = convert_sync_batchnorm(encoder)
        model.freezing.hold_again(model.model)
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        return model  # in evaluation they are what they were
