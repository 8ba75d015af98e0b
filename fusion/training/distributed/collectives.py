"""What all ranks do together."""

import torch.distributed as dist
from torch import Tensor


def summed(x: Tensor, world_size: int) -> Tensor:
    """The sum over all ranks: one collective, where Lightning's way waits at a barrier first."""
    if world_size > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x
