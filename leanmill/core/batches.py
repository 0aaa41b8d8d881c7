"""What a micro-batch is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from torch import Tensor

Batch = Mapping[str, "Tensor"]
"""One micro-batch on its device: `input_ids` [B, S] int64, `labels` [B, S] int64 (already shifted:
`labels[b, t]` is the target of position t, -100 where there is none), `position_ids` [B, S] int64
(restarting at 0 in each document). In training also `row_ids` [B] int64: numbers of the rows in the
order of the data, the same on any number of ranks."""
