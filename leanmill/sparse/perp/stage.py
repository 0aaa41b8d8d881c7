"""The mask that keeps adapters out of pruned weights, as a stage."""

from __future__ import annotations

from typing import ClassVar

from leanmill.sparse.zeros import ZeroMask


class PerpMask(ZeroMask):
    """Keeps the zeros that the weight was loaded with, whatever deltas are added to it."""

    technique: ClassVar[str] = "perp"
