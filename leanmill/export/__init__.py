"""Writing a checkpoint in formats others load. Importing this imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from leanmill.export.report import ExportReport


__all__ = ["ExportReport", "export_adapter", "export_hf"]


def export_hf(
    checkpoint_dir: str | Path,
    out_dir: str | Path,
    *,
    packing: Literal["none", "bitnet"] = "none",
    activations: Literal["trained", "float"] = "trained",
) -> ExportReport:
    """Write a Hugging Face folder with every technique folded; see `leanmill.export.hf`."""
    from leanmill.export.hf import export_hf as write

    return write(Path(checkpoint_dir), Path(out_dir), packing=packing, activations=activations)


def export_adapter(checkpoint_dir: str | Path, out_dir: str | Path) -> ExportReport:
    """Write a PEFT adapter folder; see `leanmill.export.adapter`."""
    from leanmill.export.adapter import export_adapter as write

    return write(Path(checkpoint_dir), Path(out_dir))
