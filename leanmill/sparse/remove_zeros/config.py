"""Cutting zeros out. Imports no torch."""

from __future__ import annotations

from typing import Literal

from leanmill.core.surgery import Surgeon, SurgeryConfig


class RemoveZeros(SurgeryConfig):
    """Cut out the heads and neurons whose weights are zero, which changes nothing that the model computes.

    For what `lora_prune`, or a mask of rows or columns, has left. Attentions and MLPs that are zero go altogether, and
    so do blocks of which both are.
    """

    type: Literal["remove_zeros"] = "remove_zeros"
    """Name of the pass."""

    @property
    def looks(self) -> bool:
        return True

    @property
    def reads_text(self) -> bool:
        return False

    def surgeon(self, seed: int) -> Surgeon:
        from leanmill.sparse.remove_zeros.surgeon import ZerosSurgeon

        return ZerosSurgeon()
