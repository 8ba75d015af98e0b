"""Data: from a manifest to batches."""

from fusion.data.curriculum import Curriculum
from fusion.data.format import Format
from fusion.data.module import FusionData
from fusion.data.prepare import Preparer, Script
from fusion.data.samples import Batch
from fusion.data.scene_targets import SceneTargets
from fusion.data.shapes import Shapes
from fusion.data.table import Columns

__all__ = ["Batch", "Columns", "Curriculum", "Format", "FusionData", "Preparer", "SceneTargets", "Script", "Shapes"]
