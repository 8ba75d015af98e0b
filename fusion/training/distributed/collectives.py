"""Collectives over all ranks."""

import torch
import torch.distributed as dist
from torch import Tensor


def summed(x: Tensor, world_size: int) -> Tensor:
    """Sum over all ranks by one collective (Lightning's reduction waits at a barrier first)."""
    if world_size > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def gathered(x: Tensor, world_size: int) -> Tensor:
    """The tensors (n, ...) of all ranks, of equal shape, one after the other: (world_size * n, ...). A copy, without gradient."""
    x = x.detach()
    if world_size == 1:
        return x.clone()
    all_ranks = [torch.empty_like(x) for _ in range(world_size)]
    dist.all_gather(all_ranks, x.contiguous())
    return torch.cat(all_ranks)
