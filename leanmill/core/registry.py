"""The one table of technique names. Values are strings, so listing them imports nothing."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from leanmill.core.errors import ConfigError
from leanmill.core.near import near_names
from leanmill.core.technique import TechniqueConfig


@dataclass(frozen=True)
class Entry:
    """Where a technique lives and what it is."""

    target: str
    """`module:Class`, imported when a recipe asks for it; importing it must not import torch."""
    summary: str
    paper: str


TECHNIQUES: dict[str, Entry] = {
    "nm_sparsity": Entry(
        "leanmill.sparse.nm_sparsity.config:NMSparsity",
        "keep N of every M weights along the contraction dim, straight-through or SR-STE",
        "Zhou et al. 2021, arXiv:2102.04010",
    ),
    "ternary": Entry(
        "leanmill.quant.ternary.config:Ternary",
        "weights in {-s, 0, s}: absmean (BitNet b1.58), TWN or MSE-optimal scale",
        "Ma et al. 2024, arXiv:2402.17764; Li et al. 2016, arXiv:1605.04711",
    ),
    "lora": Entry(
        "leanmill.peft_ext.lora.config:Lora",
        "low-rank adapters, inside the weight or as an output branch through PEFT",
        "Hu et al. 2021, arXiv:2106.09685",
    ),
    "distill": Entry(
        "leanmill.distill.logits.config:Distill",
        "match a frozen teacher's next-token distribution",
        "Hinton et al. 2015, arXiv:1503.02531",
    ),
}


def technique_class(name: str) -> type[TechniqueConfig]:
    """Import and return the technique registered under `name`.

    Raises:
        ConfigError: No such technique; the message names the nearest known ones.
    """
    entry = TECHNIQUES.get(name)
    if entry is None:
        near = near_names(name, TECHNIQUES, count=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "run `leanmill methods` for the list"
        raise ConfigError(f"unknown technique type {name!r}; known: {', '.join(TECHNIQUES)}; {hint}")
    module_name, _, class_name = entry.target.partition(":")
    return getattr(importlib.import_module(module_name), class_name)  # type: ignore[no-any-return]


def _kind(value: Any) -> str:
    kinds = {type(None): "nothing", str: "text", bool: "true or false", list: "a list", dict: "a mapping"}
    return kinds.get(type(value), "a number")


def parse_technique(raw: Any) -> TechniqueConfig:
    """Turn one entry of a recipe's `techniques` list into its validated configuration."""
    if isinstance(raw, TechniqueConfig):
        return raw
    if not isinstance(raw, dict) or "type" not in raw:
        # What was given is not repeated: it may be anything, a credential too.
        given = "one without" if isinstance(raw, dict) else _kind(raw)
        raise ConfigError(f"a technique is a mapping with a `type`, got {given}; type e.g. {{type: ternary}}")
    if not isinstance(raw["type"], str):
        known = ", ".join(TECHNIQUES)
        raise ConfigError(f"the `type` of a technique is a name, got {_kind(raw['type'])}; known types: {known}")
    return technique_class(raw["type"]).model_validate(raw)
