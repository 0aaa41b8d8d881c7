"""What shares a scale: a whole weight, an output row, or a group of neighbours in a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from leanmill.quant.scales import Granularity, scale_shape, shared_amax, shared_sum


@dataclass(frozen=True)
class Sharing:
    """Which weights of a weight [..., out, in] have one scale; each expert of a stacked one is a weight by itself."""

    granularity: Granularity = "row"
    group_size: int | None = None
    """Neighbours of a group, for `granularity: group`."""

    def scale_shape(self, weight_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scales of a weight of this shape, see `scales.scale_shape`."""
        return scale_shape(weight_shape, self.granularity, self.group_size)

    def largest(self, values: Tensor) -> Tensor:
        """Largest magnitude of what shares a scale, in the shape of the scales."""
        return shared_amax(values, self.granularity, self.group_size)

    def total(self, values: Tensor) -> Tensor:
        """Sum over what shares a scale, in the shape of the scales."""
        return shared_sum(values, self.granularity, self.group_size)

    def spread(self, scales: Tensor, num_in: int) -> Tensor:
        """Return values in the shape of the scales so that they broadcast against a weight of `num_in` columns."""
        return scales if self.group_size is None else scales.repeat_interleave(num_in // scales.shape[-1], -1)

    def spans_rows(self, weight_shape: Sequence[int]) -> bool:
        """Whether rows along the weight's first dim share a scale, so that parts of a weight must ask each other."""
        return self.granularity == "tensor" and len(weight_shape) == 2
