"""Fusion heads: every fusion method behind one contract, depending on torch alone."""

from fusion.heads.all_heads import *  # noqa: F403
from fusion.heads.attention import attention_maps
from fusion.heads.base import FusionHead, FusionOutput
from fusion.heads.dual_encoder import DualEncoder
from fusion.heads.per_task import PerTask
from fusion.heads.registry import HEADS, HeadInfo, available, describe
from fusion.heads.unimodal import Unimodal

__all__ = [
    "DualEncoder",
    "FusionHead",
    "FusionOutput",
    "HeadInfo",
    "PerTask",
    "Unimodal",
    "attention_maps",
    "available",
    "describe",
    *HEADS,
]
