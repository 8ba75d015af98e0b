"""Training: the engine, its schedules and its precision."""

from fusion.training.balance import OGMGE, Balance, GradientBlending, MMPareto, UnimodalLosses
from fusion.training.callbacks.early_stopping import StopEarly
from fusion.training.confidence_losses import PDF, QMF
from fusion.training.distillation import Teacher
from fusion.training.distributed.ddp import DDP
from fusion.training.distributed.fsdp import FSDP
from fusion.training.engine import Engine
from fusion.training.mixing import Mixing
from fusion.training.optim.averages import EMA, SWA
from fusion.training.optim.freezing import Freeze
from fusion.training.optim.groups import Rate
from fusion.training.optim.muon import Muon
from fusion.training.optim.precision import Bf16OnCpu, Fp16
from fusion.training.optim.schedules import (
    Constant,
    Cosine,
    CosineRestarts,
    Exponential,
    Linear,
    Polynomial,
    Schedule,
    Step,
    WarmupStableDecay,
)

__all__ = [
    "DDP",
    "EMA",
    "FSDP",
    "OGMGE",
    "PDF",
    "QMF",
    "SWA",
    "Balance",
    "Bf16OnCpu",
    "Constant",
    "Cosine",
    "CosineRestarts",
    "Engine",
    "Exponential",
    "Fp16",
    "Freeze",
    "GradientBlending",
    "Linear",
    "MMPareto",
    "Mixing",
    "Muon",
    "Polynomial",
    "Rate",
    "Schedule",
    "Step",
    "StopEarly",
    "Teacher",
    "UnimodalLosses",
    "WarmupStableDecay",
]
