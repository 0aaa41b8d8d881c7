"""Merging branches by what of them stands out. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from leanmill.core.passes import MergingPassConfig


if TYPE_CHECKING:
    from torch import Tensor


class BranchMerge(MergingPassConfig):
    """Take of each branch the weights that moved most, in rows that changed most: branch-merge distillation's merge.

    Sun et al. 2025, arXiv:2503.04872, by way of Arcee Fusion.
    """

    type: Literal["branch_merge"] = "branch_merge"
    """Name of the pass."""

    def taken(self, mine: Tensor, other: Tensor) -> Tensor:
        from leanmill.distill.branch_merge.fuse import stands_out

        return stands_out(mine, other)
