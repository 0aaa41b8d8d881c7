"""One entry for the N:M mask, choosing the fastest formulation that covers the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from leanmill.kernels.nm_mask import cpu, naive


_LARGEST_RANKED_GROUP = 16
"""Above this, comparing all pairs of a group costs more than sorting it."""


@torch.no_grad()
def nm_mask(weight: Tensor, num_kept: int, group_size: int) -> Tensor:
    """Return a bool mask [..., in], true for the `num_kept` largest magnitudes of each group.

    Args:
        weight: Floating [..., in], where `group_size` divides `in`.
        num_kept: Entries kept of each group, N of "N:M".
        group_size: Neighbours along the last dim in a group, M of "N:M".

    Returns:
        The mask: ties keep the lower index, NaN counts as larger than infinity, and every group
        keeps exactly `num_kept`.
    """
    if torch.compiler.is_compiling():
        is_small = group_size <= _LARGEST_RANKED_GROUP
    elif cpu.is_supported(weight, group_size):
        return cpu.nm_mask(weight, num_kept, group_size)
    else:
        is_small = group_size <= _LARGEST_RANKED_GROUP and weight.device.type != "cpu"
    formulation = naive.nm_mask_by_rank if is_small else naive.nm_mask_by_sort
    return formulation(weight, num_kept, group_size)
