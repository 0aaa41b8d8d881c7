"""Which weights one-shot pruning keeps: N of every M in a row, or a share of each row. Imports torch lazily."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.passes import LayerPassConfig, LinearPassConfig


if TYPE_CHECKING:
    from torch import Tensor


class PatternConfig(LinearPassConfig):
    """Mixed into passes that prune in one shot: the pattern."""

    num_kept: int | None = Field(default=None, ge=1)
    """Weights kept of each `group_size` neighbours in a row (N of N:M)."""
    group_size: int | None = Field(default=None, ge=2, le=64)
    """Neighbours in a group (M of N:M); it must divide the inputs of every target."""
    sparsity: float | None = Field(default=None, gt=0, lt=1)
    """Share of weights pruned without a pattern; give this, or `num_kept` and `group_size`."""

    @model_validator(mode="after")
    def _is_one_pattern(self) -> PatternConfig:
        grouped = self.num_kept is not None and self.group_size is not None
        if grouped == (self.sparsity is not None) or (self.num_kept is None) != (self.group_size is None):
            raise ConfigError(
                f"a pruning pass takes one pattern, got num_kept={self.num_kept}, group_size={self.group_size}, "
                f"sparsity={self.sparsity}; set num_kept: 2 and group_size: 4, or sparsity: 0.5"
            )
        if self.num_kept is not None and self.group_size is not None and self.num_kept >= self.group_size:
            raise ConfigError(
                f"num_kept {self.num_kept} of group_size {self.group_size} prunes nothing; "
                f"num_kept must be 1 to {self.group_size - 1}"
            )
        return self

    @property
    def bits_per_weight(self) -> float:
        if self.num_kept is not None and self.group_size is not None:
            return 16.0 * self.num_kept / self.group_size
        return 16.0 * (1 - (self.sparsity or 0.0))

    def check_shape(self, name: str, shape: tuple[int, int]) -> None:
        """Refuse a weight whose rows the groups do not divide.

        Raises:
            ConfigError: See above.
        """
        if self.group_size is not None and shape[1] % self.group_size:
            raise ConfigError(
                f"{name}: group_size {self.group_size} does not divide the last dim of its weight {list(shape)}; "
                f"add {name!r} to exclude, or choose a group_size that divides {shape[1]}"
            )

    def keep(self, score: Tensor, *, whole: bool = False) -> Tensor:
        """Return the bool mask [out, in] of what `score` [out, in] keeps: the highest, the lower index in ties.

        Args:
            score: Importance of each weight, at least 0.
            whole: Compare the whole matrix instead of each row, where there is no N:M.
        """
        from leanmill.kernels.nm_mask.op import nm_mask

        if self.group_size is not None and self.num_kept is not None:
            return nm_mask(score, self.num_kept, self.group_size)
        assert self.sparsity is not None
        rows = score.flatten().unsqueeze(0) if whole else score
        num_kept = rows.shape[-1] - int(rows.shape[-1] * self.sparsity)
        return _highest(rows, num_kept).view_as(score)


class PruningPass(PatternConfig, LayerPassConfig):
    """Base of one-shot pruning by what inputs are."""


def _highest(score: Tensor, num_kept: int) -> Tensor:
    import numpy as np
    import torch

    mask = torch.zeros_like(score, dtype=torch.bool)
    for row, kept in zip(score, mask, strict=True):  # one after another, and by selection: an order takes 8 bytes each
        least = np.partition(row.numpy(), len(row) - num_kept)[len(row) - num_kept].item()
        torch.gt(row, least, out=kept)
        ties = (row == least).nonzero().squeeze(-1)
        kept[ties[: num_kept - int(kept.sum())]] = True
    return mask
