"""Frozen models, such as a teacher, whose blocks are sharded over the ranks of whatever engine trains the student."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from leanmill.core.blocks import decoder_blocks


def shard_frozen(model: nn.Module, mesh: DeviceMesh, device: torch.device) -> nn.Module:
    """Shard the blocks of a frozen model by FSDP2, and return it.

    Embedding, final norm and head stay whole on every rank: a loss may use the head's weight outside of a forward.
    Every rank must run the model equally often.

    Args:
        model: Materialised, on the CPU.
        mesh: Of the ranks that share it.
        device: Where it runs.
    """
    for block in decoder_blocks(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    move_plain_tensors(model, device)
    return model


@torch.no_grad()
def move_plain_tensors(module: nn.Module, device: torch.device) -> None:
    """Move what is not sharded; sharded parameters are where their policy wants them."""
    for owner in module.modules():
        for parameter in owner._parameters.values():
            if parameter is not None and not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(device)
        for key, buffer in owner._buffers.items():
            if buffer is not None and not isinstance(buffer, DTensor):
                owner._buffers[key] = buffer.to(device)
