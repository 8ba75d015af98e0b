"""Fusion heads: every way to join modalities, behind one contract, with torch alone."""

from fusion.heads.adaptive_graph import AdaptiveGraph
from fusion.heads.attention import attention_maps
from fusion.heads.base import FusionHead, FusionOutput
from fusion.heads.bottleneck import Bottleneck
from fusion.heads.co_attention import CoAttention
from fusion.heads.concat import Concat
from fusion.heads.confidence_weighted import ConfidenceWeighted
from fusion.heads.cross_attention import CrossAttention
from fusion.heads.embrace import Embrace
from fusion.heads.factorized_bilinear import FactorizedBilinear
from fusion.heads.film import FiLM
from fusion.heads.gated import Gated
from fusion.heads.gated_cross_attention import GatedCrossAttention
from fusion.heads.joint_transformer import JointTransformer
from fusion.heads.level_weighted import LevelWeighted
from fusion.heads.logit_mean import LogitMean
from fusion.heads.low_rank_tensor import LowRankTensor
from fusion.heads.mutan import Mutan
from fusion.heads.perceiver import Perceiver
from fusion.heads.product_of_experts import ProductOfExperts
from fusion.heads.registry import HeadInfo, available, describe
from fusion.heads.residual_mlp import ResidualMLP
from fusion.heads.squeeze_excite import SqueezeExcite
from fusion.heads.stacking import Stacking
from fusion.heads.tensor_fusion import TensorFusion
from fusion.heads.unimodal import Unimodal
from fusion.heads.weighted_logits import WeightedLogits

__all__ = [
    "AdaptiveGraph",
    "Bottleneck",
    "CoAttention",
    "Concat",
    "ConfidenceWeighted",
    "CrossAttention",
    "Embrace",
    "FactorizedBilinear",
    "FiLM",
    "FusionHead",
    "FusionOutput",
    "Gated",
    "GatedCrossAttention",
    "HeadInfo",
    "JointTransformer",
    "LevelWeighted",
    "LogitMean",
    "LowRankTensor",
    "Mutan",
    "Perceiver",
    "ProductOfExperts",
    "ResidualMLP",
    "SqueezeExcite",
    "Stacking",
    "TensorFusion",
    "Unimodal",
    "WeightedLogits",
    "attention_maps",
    "available",
    "describe",
]
