"""Where the tokens of some rows went, as plain arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


Ids = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Routed:
    """Where the tokens of some rows went in one layer."""

    tokens: Ids
    """[R, S] token ids."""
    experts: Ids
    """[R, S, K] chosen experts, best first; `num_experts` where a choice was dropped."""
    is_real: NDArray[np.bool_]
    """[R, S]: False at padding."""
    num_experts: int
