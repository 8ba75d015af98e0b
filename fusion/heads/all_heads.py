"""List of all fusion heads, by family, simplest first. A new head is added here."""

# ruff: noqa: I001 (ordered by family)
from fusion.heads.joint_transformer import JointTransformer as JointTransformer
from fusion.heads.concat import Concat as Concat
from fusion.heads.residual_mlp import ResidualMLP as ResidualMLP
from fusion.heads.gated import Gated as Gated
from fusion.heads.film import FiLM as FiLM
from fusion.heads.tensor_fusion import TensorFusion as TensorFusion
from fusion.heads.low_rank_tensor import LowRankTensor as LowRankTensor
from fusion.heads.factorized_bilinear import FactorizedBilinear as FactorizedBilinear
from fusion.heads.mutan import Mutan as Mutan
from fusion.heads.aligned_product import AlignedProduct as AlignedProduct
from fusion.heads.embrace import Embrace as Embrace
from fusion.heads.level_weighted import LevelWeighted as LevelWeighted
from fusion.heads.squeeze_excite import SqueezeExcite as SqueezeExcite
from fusion.heads.bottleneck import Bottleneck as Bottleneck
from fusion.heads.perceiver import Perceiver as Perceiver
from fusion.heads.adaptive_graph import AdaptiveGraph as AdaptiveGraph
from fusion.heads.interaction_experts import InteractionExperts as InteractionExperts
from fusion.heads.logit_mean import LogitMean as LogitMean
from fusion.heads.weighted_logits import WeightedLogits as WeightedLogits
from fusion.heads.product_of_experts import ProductOfExperts as ProductOfExperts
from fusion.heads.confidence_weighted import ConfidenceWeighted as ConfidenceWeighted
from fusion.heads.predicted_confidence import PredictedConfidence as PredictedConfidence
from fusion.heads.stacking import Stacking as Stacking
from fusion.heads.cross_attention import CrossAttention as CrossAttention
from fusion.heads.co_attention import CoAttention as CoAttention
from fusion.heads.gated_cross_attention import GatedCrossAttention as GatedCrossAttention
