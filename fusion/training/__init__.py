"""Training: tasks, their schedules and their precision."""

from fusion.training.averages import EMA, SWA
from fusion.training.balance import OGMGE, Balance, GradientBlending, MMPareto, UnimodalLosses
from fusion.training.classification import Classification
from fusion.training.ddp import DDP
from fusion.training.freezing import Freeze
from fusion.training.fsdp import FSDP
from fusion.training.groups import Rate
from fusion.training.muon import Muon
from fusion.training.precision import Bf16OnCpu, Fp16
from fusion.training.schedules import (
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
from fusion.training.task import Task

__all__ = [
    "DDP",
    "EMA",
    "FSDP",
    "OGMGE",
    "SWA",
    "Balance",
    "Bf16OnCpu",
    "Classification",
    "Constant",
    "Cosine",
    "CosineRestarts",
    "Exponential",
    "Fp16",
    "Freeze",
    "GradientBlending",
    "Linear",
    "MMPareto",
    "Muon",
    "Polynomial",
    "Rate",
    "Schedule",
    "Step",
    "Task",
    "UnimodalLosses",
    "WarmupStableDecay",
]
