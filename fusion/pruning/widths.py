"""The widths that pruning left, as plain data, and the model of these widths."""

from collections.abc import Mapping
from typing import Any

import torch

from fusion.errors import UserError, nearest
from fusion.model import FusionModel
from fusion.pruning.blocks import find_groups


def narrow(model: FusionModel, widths: Mapping[str, Any], option: str = "model.pruned") -> None:
    """Removes units from a newly built model, so that it has these widths; its weights are loaded afterwards.

    widths: by the name of a group (`find_groups`), the number of its units. option: where they were given, for messages.

    Raises UserError for a group that the model doesn't have, and for a number of units that it can't have.
    """
    if not widths:
        return
    groups = find_groups(model)
    for name, width in widths.items():
        if name not in groups:
            raise UserError(f"{option}: this model has no units '{name}' to remove. {nearest(name, groups)}")
        units = groups[name].units
        if type(width) is not int or not 1 <= width <= units:
            raise UserError(f"{option}.{name} is {width}; expected a number of {groups[name].kind} from 1 to {units}")
        groups[name].keep(torch.arange(width))
