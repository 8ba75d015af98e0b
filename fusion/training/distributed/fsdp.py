"""Fully sharded data parallel (FSDP2), for encoders that don't fit on one device with their gradients and optimiser state."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fusion.encoders import Encoder
from fusion.errors import UserError
from fusion.lightning_private import WholeMesh
from fusion.model import FusionModel
from fusion.training.distributed.lost_ranks import LeavesLostRanks


class FSDP(LeavesLostRanks, WholeMesh):
    """Lightning's FSDP2 over all processes: each has a shard of every weight, gradient and optimiser state, and gathers the weights of a
    block only while computing it. Checkpoints are not sharded; they are the same as with other strategies.

    Precision: 32-true or bf16-mixed (fp16 with a gradient scaler needs DDP). With `model.compile` graphs break where shards are gathered:
    each block is compiled separately; the losses are the same as of the whole model compiled.

    Args:
        timeout_s: how long a rank waits for another before the run ends, in seconds; above 0.
    """

    def __init__(self, timeout_s: float = 1800.0) -> None:
        if timeout_s <= 0:
            raise UserError(f"FSDP: timeout_s is {timeout_s}; expected a number above 0")
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timedelta(seconds=timeout_s))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        if self.is_global_zero:  # the full state is gathered on rank 0
            self.checkpoint_io.save_checkpoint(checkpoint, filepath)


def shard(model: FusionModel, mesh: DeviceMesh, dtype: torch.dtype | None = None) -> None:
    """Shard the blocks of the encoders, then the rest of the model, frozen or trained. Done once.

    dtype: in which weights are gathered (half the bytes under bf16 autocast, which would cast them anyway); gradients are summed in
    float32. Ignored for models with batch normalisation, whose weights must be float32 like its statistics.
    """
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        dtype = None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for p in model.parameters():
        p.data = p.data.contiguous()  # FSDP requires it (convolutions may be channels last)
    for encoder in model.encoders.values():
        assert isinstance(encoder, Encoder)
        for block in blocks(encoder):
            fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def blocks(encoder: nn.Module) -> list[nn.Module]:
    """The repeated blocks of an encoder: the members of its outermost module lists."""
    members: list[nn.Module] = []
    for child in encoder.children():
        if isinstance(child, nn.ModuleList | nn.Sequential) and len(child) > 1:
            members += [block for block in child if any(True for _ in block.parameters())]
        else:
            members += blocks(child)
    return members
