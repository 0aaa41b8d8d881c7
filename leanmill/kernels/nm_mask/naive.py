"""The N:M mask in plain tensor code: two formulations that agree on every input."""

from __future__ import annotations

import torch
from torch import Tensor


def nm_mask_by_sort(weight: Tensor, num_kept: int, group_size: int) -> Tensor:
    """Return a bool mask [..., in], true for the `num_kept` largest magnitudes of each group.

    Groups are `group_size` neighbours along the last dim. Ties keep the lower index; -0.0 ties with
    0.0 and NaN counts as larger than infinity, so every group keeps exactly `num_kept`.
    """
    groups = weight.abs().unflatten(-1, (-1, group_size))
    kept = groups.sort(dim=-1, descending=True, stable=True).indices[..., :num_kept]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, kept, True).flatten(-2)


def nm_mask_by_rank(weight: Tensor, num_kept: int, group_size: int) -> Tensor:
    """Same mask without sorting: an entry stays if fewer than `num_kept` of its group come before it.

    Compares all pairs of a group, so intermediates are `group_size` x the weight in bools when run
    eagerly; a compiler fuses them away.
    """
    groups = weight.abs().unflatten(-1, (-1, group_size))
    other, one = groups.unsqueeze(-2), groups.unsqueeze(-1)
    index = torch.arange(group_size, device=weight.device)
    is_lower = index.unsqueeze(0) < index.unsqueeze(1)
    tied = (other == one) | (other.isnan() & one.isnan())
    larger = (other > one) | (other.isnan() & ~one.isnan())
    num_before = (larger | (tied & is_lower)).sum(-1)
    return (num_before < num_kept).flatten(-2)
