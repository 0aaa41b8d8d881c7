"""Merging LoRA adapter folders of PEFT into one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from leanmill.core.errors import ConfigError
from leanmill.core.folders import check_is_new, new_folder
from leanmill.peft_ext.lego.units import Factors, merge_factors


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_A, _B = ".lora_A.weight", ".lora_B.weight"
_PREFIX = "base_model.model."
_NOT_A_SUM = ("use_dora", "lora_bias", "target_parameters", "modules_to_save", "trainable_token_indices")
"""Options under which an adapter is more than B A on linear layers."""
_BESIDE_THE_BASE = (True, False, "gaussian", "orthogonal", "eva")
"""Starts that leave the base as it is; others move a part of it into the adapter, or round it."""


@dataclass(frozen=True)
class MergeReport:
    """What was written."""

    num_layers: int
    num_units: int
    """Ranks of all adapters and layers."""
    num_kept: int
    """Ranks of the merged adapter."""

    def __str__(self) -> str:
        return f"{self.num_layers} layers, {self.num_units} ranks merged into {self.num_kept}"


def merge_adapters(
    folders: Sequence[str | Path], out: str | Path, *, rank: int | None = None, seed: int = 0
) -> MergeReport:
    """Merge LoRA adapters of one base, rank by rank, and write the result as PEFT does.

    Args:
        folders: At least two.
        out: New folder.
        rank: Of the merged adapter in each layer; None takes the adapters' largest.
        seed: Of the first centres.

    Raises:
        ConfigError: A folder is no LoRA adapter, they belong to different bases, or shapes differ.
        RunError: The disk is full or refuses.
    """
    out = Path(out)
    check_is_new(out)
    if len(folders) < 2:
        raise ConfigError("merging takes two adapters or more; name more folders")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank={rank} leaves nothing; set it to 1 or more")
    opened = [_read(Path(folder)) for folder in folders]
    _check_bases(folders, [config for config, _ in opened])
    layers = _by_layer(folders, [factors for _, factors in opened])
    most = max(len(one.a) for adapters in layers.values() for one in adapters)
    merged = {name: merge_factors(adapters, rank or most, seed) for name, adapters in layers.items()}
    with new_folder(out) as folder:
        _write(folder, opened[0][0], merged, rank or most)
    num_units = sum(len(one.a) for adapters in layers.values() for one in adapters)
    return MergeReport(len(merged), num_units, sum(len(one.a) for one in merged.values()))


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Factors]]:
    """Return the configuration of an adapter and its factors by layer."""
    from peft import LoraConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        name = Path(str(error.filename or WEIGHTS)).name
        raise ConfigError(f"{folder} has no {name}; name folders that PEFT or --to adapter wrote") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{folder} cannot be read ({' '.join(str(error).split())}); write it again") from None
    if raw.get("peft_type") != "LORA":
        raise ConfigError(f"{folder} is an adapter of {raw.get('peft_type')}, and only LORA is merged rank by rank")
    for key in _NOT_A_SUM:
        if raw.get(key):
            raise ConfigError(f"{folder} has {key}={raw[key]!r}, which is more than B A; merge it into its base")
    start = raw.get("init_lora_weights", True)
    if start not in _BESIDE_THE_BASE:
        raise ConfigError(
            f"{folder} has init_lora_weights={start!r}, whose B A is beside another base; save it again with PEFT's "
            f"path_initial_model_for_weight_conversion, or merge it into its base"
        )
    known = {key: value for key, value in raw.items() if key in LoraConfig.__dataclass_fields__}
    return raw, _factors(folder, LoraConfig(**known), tensors)


def _factors(folder: Path, config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    from peft.utils.other import get_pattern_key

    found: dict[str, Factors] = {}
    for key, a in tensors.items():
        if not key.endswith((_A, _B)):
            raise ConfigError(f"{folder} holds {key}, which is no factor of a linear layer; merge it into its base")
        if key.removesuffix(_A).removesuffix(_B) + (_B if key.endswith(_A) else _A) not in tensors:
            raise ConfigError(f"{folder} holds {key} without the factor beside it; save the adapter again")
        if key.endswith(_A):
            name, b = key.removesuffix(_A), tensors[key.removesuffix(_A) + _B]
            layer = name.removeprefix(_PREFIX)
            if not (a.isfinite().all() and b.isfinite().all()):
                raise ConfigError(f"{folder} holds values of {layer} that are no numbers; train it again")
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, layer), config.lora_alpha)
            if alpha == 0:
                raise ConfigError(f"{folder} has lora_alpha=0 for {layer}, so it adds nothing; leave it out")
            found[layer] = Factors(a, b, alpha / (len(a) ** 0.5 if config.use_rslora else len(a)))
    return found


def _check_bases(folders: Sequence[str | Path], configs: Sequence[Mapping[str, Any]]) -> None:
    bases = [config.get("base_model_name_or_path") for config in configs]
    for folder, base in zip(folders, bases, strict=True):
        if base != bases[0]:
            raise ConfigError(f"{folder} belongs to {base} and {folders[0]} to {bases[0]}; merge adapters of one base")


def _by_layer(folders: Sequence[str | Path], adapters: Sequence[Mapping[str, Factors]]) -> dict[str, list[Factors]]:
    layers: dict[str, list[Factors]] = {}
    for folder, factors in zip(folders, adapters, strict=True):
        for name, one in factors.items():
            others = layers.setdefault(name, [])
            if others and (one.a.shape[1], one.b.shape[0]) != (others[0].a.shape[1], others[0].b.shape[0]):
                raise ConfigError(f"{folder}: {name} has other sides than in {folders[0]}; merge adapters of one base")
            others.append(one)
    return layers


def _write(folder: Path, first: Mapping[str, Any], merged: Mapping[str, Factors], rank: int) -> None:
    from safetensors.torch import save_file

    alphas = {name: one.scaling * len(one.a) for name, one in merged.items()}
    common = max(set(alphas.values()), key=list(alphas.values()).count)
    config = {
        **first,
        "r": rank,
        "lora_alpha": common,
        "use_rslora": False,
        "rank_pattern": {name: len(one.a) for name, one in merged.items() if len(one.a) != rank},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != common},
        "target_modules": sorted(merged),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors = {f"{_PREFIX}{name}{_A}": one.a.contiguous() for name, one in merged.items()}
    tensors |= {f"{_PREFIX}{name}{_B}": one.b.contiguous() for name, one in merged.items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
