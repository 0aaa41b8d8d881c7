"""Exporting a checkpoint as a Hugging Face folder of plain weights."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from leanmill.core.errors import RunError
from leanmill.core.folders import folder_bytes, new_folder
from leanmill.core.sites import iter_sites
from leanmill.core.stage import Slot
from leanmill.export import bitnet
from leanmill.export.activations import Activations, settle_activations
from leanmill.export.compare import allowed, check_same, largest_difference, reload, sample_logits
from leanmill.export.folding import fold, folded_weights
from leanmill.export.report import ExportReport
from leanmill.models.pretrained import quiet_transformers
from leanmill.trainer.rebuild import Rebuilt, rebuild


def export_hf(
    checkpoint_dir: Path,
    out_dir: Path,
    *,
    packing: Literal["none", "bitnet"] = "none",
    activations: Activations = "trained",
) -> ExportReport:
    """Write config, safetensors, tokenizer and `leanmill.json`, then load them back and compare.

    Every stage is folded into its weight (zeros of a mask in place, quantised weights de-quantised)
    and adapters are merged, all in fp32.

    Args:
        checkpoint_dir: A finished checkpoint of a run.
        out_dir: Folder to create.
        packing: `bitnet` packs ternary linear weights to 2 bits in transformers' BitNet format,
            whose linears also quantise their input to 8 bits, see `bitnet.py`.
        activations: `float` writes a model that trained with rounded activations without the rounding.

    Raises:
        ConfigError: The checkpoint or the packing cannot be exported this way.
        RunError: The copy loaded back differs, or the disk is full; `out_dir` is not created.
    """
    rebuilt = rebuild(checkpoint_dir)
    model = rebuilt.model
    trained = sample_logits(model)
    notes = settle_activations(model, activations, packing)
    expected = sample_logits(model)
    if notes:
        notes += (f"largest logit difference by that: {largest_difference(expected, trained):.2e}",)
    staged = folded_weights(model)
    masked = _masks(model)
    ternary = bitnet.ternary_weights(model) if packing == "bitnet" else {}
    fold(model)
    check_same(sample_logits(model), expected, "the folded model")
    with new_folder(out_dir) as folder:
        prepare_config(model, rebuilt, folder)
        if packing == "bitnet":
            bitnet.save(model, ternary, folder)
            reloaded, difference, limit, more = bitnet.check(folder, model, ternary, trained)
            notes += more
            packed = {f"{name}.weight" for name in ternary}
            unpacked = {name: weight for name, weight in staged.items() if name not in packed}
            _check_weights(reloaded, unpacked, {n: m for n, m in masked.items() if n not in packed})
        else:
            with quiet_transformers():
                model.save_pretrained(folder, safe_serialization=True)
            reloaded = reload(folder)
            difference, limit = check_same(sample_logits(reloaded), expected, "the reloaded export"), allowed(expected)
            _check_weights(reloaded, staged, masked)
        write_summary(folder, rebuilt, format="bitnet" if packing == "bitnet" else "huggingface", difference=difference)
        num_bytes = folder_bytes(folder)
    return ExportReport(
        path=out_dir,
        format="bitnet" if packing == "bitnet" else "huggingface",
        max_difference=difference,
        tolerance=limit,
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_bytes=num_bytes,
        sparsity={name: (staged[name] == 0).float().mean().item() for name in masked},
        notes=notes,
    )


def prepare_config(model: Any, rebuilt: Rebuilt, folder: Path) -> None:
    """Make config and generation settings those of a model to use, and store the tokenizer."""
    from transformers import AutoTokenizer, GenerationConfig

    model.config.use_cache = True
    model.config._experts_implementation = None
    if rebuilt.tokenizer_dir is not None:
        tokenizer = AutoTokenizer.from_pretrained(str(rebuilt.tokenizer_dir))
        tokenizer.save_pretrained(folder)
        for key in ("bos_token_id", "eos_token_id"):
            if getattr(model.config, key, None) is None:
                setattr(model.config, key, getattr(tokenizer, key))
        model.generation_config = GenerationConfig.from_model_config(model.config)
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def write_summary(folder: Path, rebuilt: Rebuilt, *, format: str, difference: float) -> None:  # noqa: A002
    """Write `leanmill.json`: where the weights come from."""
    summary = {
        "leanmill": metadata.version("leanmill") if _is_installed() else None,
        "trained_with": rebuilt.versions,
        "name": rebuilt.recipe.name,
        "step": rebuilt.step,
        "techniques": [technique.model_dump(mode="json") for technique in rebuilt.recipe.techniques],
        "format": format,
        "max_logit_difference": difference,
    }
    (folder / "leanmill.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _is_installed() -> bool:
    try:
        metadata.version("leanmill")
    except metadata.PackageNotFoundError:
        return False
    return True


def _masks(model: Any) -> dict[str, tuple[int, int] | None]:
    """By parameter name, the N:M of each masked weight; None where its mask has another pattern."""
    masked: dict[str, tuple[int, int] | None] = {}
    for _, site in iter_sites(model):
        stage = site.stage(Slot.MASK)
        if stage is not None:
            # Rotated back, what was zero is not.
            is_rotated = site.stage(Slot.ROTATE) is not None
            masked[site.weight_name] = None if is_rotated else stage.pattern()
    return masked


def _check_weights(reloaded: Any, staged: dict[str, Tensor], masked: dict[str, tuple[int, int] | None]) -> None:
    """Look at the weights read back: equal to the trained ones, N of every M kept."""
    for name, weight in staged.items():
        found = reloaded.get_parameter(name)
        # Adapters merged on top change a weight, and only where there is no mask to keep.
        if name in masked and not torch.equal(found, weight):
            raise RunError(f"{name} of the reloaded export is not the trained weight; nothing was written")
        pattern = masked.get(name)
        if pattern is not None:
            num_kept, group_size = pattern
            kept = (found.unflatten(-1, (-1, group_size)) != 0).sum(-1)
            if int(kept.max()) > num_kept:
                raise RunError(
                    f"{name} of the reloaded export keeps {int(kept.max())} of {group_size} weights, not {num_kept}"
                )
