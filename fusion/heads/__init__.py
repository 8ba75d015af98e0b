"""Fusion heads: every way to join modalities, behind one contract, with torch alone."""

from fusion.heads.base import FusionHead, FusionOutput
from fusion.heads.concat import Concat
from fusion.heads.cross_attention import CrossAttention
from fusion.heads.gated import Gated
from fusion.heads.joint_transformer import JointTransformer
from fusion.heads.logit_mean import LogitMean
from fusion.heads.unimodal import Unimodal
from fusion.heads.weighted_logits import WeightedLogits

__all__ = [
    "Concat",
    "CrossAttention",
    "FusionHead",
    "FusionOutput",
    "Gated",
    "JointTransformer",
    "LogitMean",
    "Unimodal",
    "WeightedLogits",
]
