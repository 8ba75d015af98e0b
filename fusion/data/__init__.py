"""Data: from a manifest to batches."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusion.data.curriculum import Curriculum
    from fusion.data.format import Format
    from fusion.data.module import FusionData
    from fusion.data.prepare import Preparer, Script
    from fusion.data.samples import Batch
    from fusion.data.scene_targets import SceneTargets
    from fusion.data.shapes import Shapes
    from fusion.data.table import Columns

# Imported on first access: a predictor reads raw values without importing Lightning and the data module.
PLACES = {
    "Batch": "samples",
    "Columns": "table",
    "Curriculum": "curriculum",
    "Format": "format",
    "FusionData": "module",
    "Preparer": "prepare",
    "SceneTargets": "scene_targets",
    "Script": "prepare",
    "Shapes": "shapes",
}


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{PLACES[name]}"), name)


__all__ = ["Batch", "Columns", "Curriculum", "Format", "FusionData", "Preparer", "SceneTargets", "Script", "Shapes"]
