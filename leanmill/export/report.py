"""What an export says it did. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """Facts of a finished export, all measured on the copy that was loaded back."""

    path: Path
    format: str
    """`huggingface`, `bitnet`, `packed` or `peft`."""
    max_difference: float
    """Largest absolute difference to the trained model of what `compared` says, on random and packed rows."""
    compared: str
    tolerance: float
    """What `max_difference` was allowed to be."""
    num_parameters: int
    """Of the exported model or adapter."""
    num_bytes: int
    """Size of the folder."""
    sparsity: dict[str, float]
    """Share of zeros in each weight that carries a mask, read from the copy."""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{self.format}: {self.num_parameters:,} parameters in {self.num_bytes / 2**20:.1f} MiB",
            f"{self.compared} {self.max_difference:.2e} (allowed {self.tolerance:.0e})",
        ]
        if self.sparsity:
            zeros = list(self.sparsity.values())
            lines.append(f"zeros in {len(zeros)} masked weights: {min(zeros):.1%} to {max(zeros):.1%}, in place")
        return "\n".join([*lines, *self.notes])
