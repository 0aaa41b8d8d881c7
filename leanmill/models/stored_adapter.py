"""The low-rank adapter that a pass has left beside a model's weights, in PEFT's format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from leanmill.core.branches import stored_names
from leanmill.core.errors import ConfigError
from leanmill.core.facets import LowRank, StoredFactors
from leanmill.core.folders import ADAPTER
from leanmill.core.paths import expand_user
from leanmill.models.config import ModelConfig


_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_BEFORE, _AFTER = stored_names("", is_embedding=False)[0].split("..")


def write_adapter(folder: Path, factors: Mapping[str, LowRank]) -> None:
    """Write factors by the plain name of their layer, all of one rank and scaling, as an adapter of PEFT's.

    It names no base, which is the model in whose folder it lies.
    """
    first = next(iter(factors.values()))
    rank = first.a.shape[0]
    alpha = first.scaling * rank
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "target_modules": sorted(factors),
        "base_model_name_or_path": None,
        "inference_mode": True,
    }
    tensors = {}
    for name, delta in factors.items():
        a, b = stored_names(name, is_embedding=False)
        tensors[a], tensors[b] = delta.a.contiguous(), delta.b.contiguous()
    folder.mkdir()
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / _TENSORS, {"format": "pt"})


def has_adapter(folder: Path) -> bool:
    """Whether `write_adapter` has left a part of a model's weights in its folder."""
    return (folder / ADAPTER / _TENSORS).is_file()


def stored_adapter(model: ModelConfig) -> dict[str, StoredFactors]:
    """Return what `write_adapter` has written into a model's folder, by the plain name of the layer.

    Raises:
        ConfigError: There is none, or it is no plain LoRA.
    """
    folder = expand_user(model.path or "") / ADAPTER
    if model.path is None or not has_adapter(folder.parent):
        raise ConfigError(
            f"lora.init=stored starts from the adapter that the pass lq_lora leaves in a model's folder, and "
            f"model.path={model.path} has none; set model.path to a folder that it wrote, or lora.init=kaiming"
        )
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        scaling = _scaling(config)
        with safe_open(folder / _TENSORS, framework="pt") as opened:
            names = [name for name in opened.keys() if name.endswith(_AFTER)]  # noqa: SIM118  (no mapping)
            ranks = {name: opened.get_slice(name).get_shape()[0] for name in names}
    except Exception as error:
        raise ConfigError(
            f"{folder} cannot be read as a plain LoRA ({error}); write the model again with the pass lq_lora"
        ) from error

    def reader(path: str) -> StoredFactors:
        a, b = stored_names(path, is_embedding=False)

        def read() -> LowRank:
            with safe_open(folder / _TENSORS, framework="pt") as file:
                return LowRank(a=file.get_tensor(a).float(), b=file.get_tensor(b).float(), scaling=scaling)

        return StoredFactors(rank=ranks[a], read=read)

    return {path: reader(path) for path in (name[len(_BEFORE) + 1 : -len(_AFTER) - 1] for name in names)}


def _scaling(config: Mapping[str, Any]) -> float:
    for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise ValueError(f"it has {key}")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"it is of type {config.get('peft_type')}")
    return float(config["lora_alpha"]) / int(config["r"])
