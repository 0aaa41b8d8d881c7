"""The mask of gradual pruning, as a stage."""

from __future__ import annotations

from typing import ClassVar

from leanmill.sparse.held import HeldMask


class GradualMask(HeldMask):
    """Keeps everything at first."""

    technique: ClassVar[str] = "gradual_pruning"
