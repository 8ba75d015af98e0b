"""Training: the task, its schedules and its precision."""

from fusion.training.classification import Classification
from fusion.training.muon import Muon
from fusion.training.precision import Fp16
from fusion.training.schedules import Constant, Cosine, Schedule

__all__ = ["Classification", "Constant", "Cosine", "Fp16", "Muon", "Schedule"]
