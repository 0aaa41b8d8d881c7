"""The mask of static sparse training, as a stage."""

from __future__ import annotations

from typing import ClassVar

from leanmill.sparse.zeros import ZeroMask


class StaticMask(ZeroMask):
    """Keeps the zeros that the weight was loaded with."""

    technique: ClassVar[str] = "static_mask"
