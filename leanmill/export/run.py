"""One export: rebuild the trained model, write it in a format, load that back and compare."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

from leanmill.core.errors import ConfigError
from leanmill.core.folders import folder_bytes, new_folder
from leanmill.export.formats import Activations, format_class
from leanmill.export.report import ExportReport
from leanmill.export.widths import switch_widths
from leanmill.trainer.rebuild import Rebuilt, rebuild


def export_model(
    checkpoint_dir: Path,
    out_dir: Path,
    *,
    to: str = "hf",
    packing: str = "none",
    activations: Activations = "trained",
    num_bits: int | None = None,
) -> ExportReport:
    """Write a folder with the model and `leanmill.json`; it comes into being once it was loaded back and compared.

    Args:
        checkpoint_dir: A finished checkpoint of a run.
        out_dir: Folder to create.
        to: Name of a format, see `formats.py`.
        packing: How the weights of `hf` are packed, see `PACKINGS`.
        activations: `float` writes a model that trained with rounded activations without the rounding.
        num_bits: Of weights that were trained in several widths; None is the recipe's.

    Raises:
        ConfigError: The checkpoint cannot be exported this way.
        RunError: The copy loaded back differs, or the disk is full; `out_dir` is not created.
    """
    format_class(to, packing)  # before anything is read
    rebuilt = rebuild(checkpoint_dir)
    if num_bits is not None:
        switch_widths(rebuilt.model, num_bits)
    return export_rebuilt(rebuilt, out_dir, str(checkpoint_dir), to=to, packing=packing, activations=activations)


def export_rebuilt(
    rebuilt: Rebuilt,
    out_dir: Path,
    source: str,
    *,
    to: str = "hf",
    packing: str = "none",
    activations: Activations = "trained",
) -> ExportReport:
    """Write a trained model that is in memory, which it uses up; `source` is what messages call it. See `export_model`.

    Raises:
        ConfigError: See `export_model`.
        RunError: See `export_model`.
    """
    kind = format_class(to, packing)
    if rebuilt.recipe.model.task not in kind.model_tasks:
        raise ConfigError(
            f"{source} is of model.task={rebuilt.recipe.model.task}, and {kind.label} is a format of causal "
            f"models; type --to hf without a packing"
        )
    reason = kind.covers(rebuilt.model)
    if reason is not None:
        raise ConfigError(f"{source} cannot be exported as {to if packing == 'none' else packing}: {reason}")
    export = kind(rebuilt, out_dir, activations)
    with new_folder(out_dir) as folder:
        export.write(folder)
        checked = export.check(folder)
        _write_summary(folder, rebuilt, label=export.label, difference=checked.max_difference)
        num_bytes = folder_bytes(folder)
    return ExportReport(
        path=out_dir,
        format=export.label,
        max_difference=checked.max_difference,
        tolerance=checked.tolerance,
        compared=checked.compared,
        num_parameters=checked.num_parameters,
        num_bytes=num_bytes,
        sparsity=dict(checked.sparsity),
        notes=checked.notes,
    )


def _write_summary(folder: Path, rebuilt: Rebuilt, *, label: str, difference: float) -> None:
    """Write `leanmill.json`: where the weights come from."""
    summary = {
        "leanmill": metadata.version("leanmill") if _is_installed() else None,
        "trained_with": rebuilt.versions,
        "name": rebuilt.recipe.name,
        "step": rebuilt.step,
        "techniques": [technique.model_dump(mode="json") for technique in rebuilt.recipe.techniques],
        "format": label,
        "max_difference": difference,
    }
    (folder / "leanmill.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _is_installed() -> bool:
    try:
        metadata.version("leanmill")
    except metadata.PackageNotFoundError:
        return False
    return True
