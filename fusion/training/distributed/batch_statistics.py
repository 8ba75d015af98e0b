"""Synchronised batch normalisation, over all devices of a run."""

from typing import Any

from lightning.pytorch.plugins import LayerSync
from timm.layers import convert_sync_batchnorm
from torch import nn


class SyncStatistics(LayerSync):
    """Computes statistics over the images of all ranks, for all batch normalisation layers of timm: torch's own conversion drops the
    activation of BatchNormAct2d (EfficientNet, RegNet, MobileNetV3).

    Frozen layers keep their statistics. A rank whose batch has no images takes part with an empty batch (`TimmImage.encode`).
    """

    def apply(self, model: Any) -> nn.Module:
        """model: an Engine whose model is built."""
        for name, encoder in model.model.encoders.items():
            model.model.encoders[name] = convert_sync_batchnorm(encoder)
        model.freezing.reapply(model.model)
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        return model  # in evaluation synchronised layers work like ordinary ones
