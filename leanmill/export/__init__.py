"""Writing a checkpoint in formats others load. Importing this imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from leanmill.export.formats import Activations
from leanmill.export.report import ExportReport


__all__ = ["ExportReport", "export_model", "load_packed"]


def export_model(
    checkpoint_dir: str | Path,
    out_dir: str | Path,
    *,
    to: str = "hf",
    packing: str = "none",
    activations: Activations = "trained",
    num_bits: int | None = None,
) -> ExportReport:
    """Write a folder of format `to` (hf, packed, adapter, ...), its weights packed; see `leanmill.export.run`."""
    from leanmill.export.run import export_model as write

    return write(
        Path(checkpoint_dir), Path(out_dir), to=to, packing=packing, activations=activations, num_bits=num_bits
    )


def load_packed(folder: str | Path) -> Any:
    """Load a folder of packed or 2:4 weights; see `leanmill.export.packed_folder.load`."""
    from leanmill.export.packed_folder import load

    return load(folder)
