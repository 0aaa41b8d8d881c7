"""Which models may have their rows cut (`layout.cp`). Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from leanmill.core.near import near_divisors


FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "olmo2", "phi3"})
"""Compared with one process, parameter by parameter: tokens meet in attention alone, attention is called through
transformers' registry, and what the model is given besides tokens reaches it."""


def context_problems(config: Any, cp: int, kind: str) -> Iterator[str]:
    """Yield why rows of a model cannot be cut into `cp` parts.

    Args:
        config: The family's config: a mapping or a transformers config; what it leaves out is not judged.
        cp: Ranks that share a row.
        kind: `layout.cp_attention`.
    """
    get = config.get if isinstance(config, dict) else lambda key: getattr(config, key, None)
    asked, family = f"layout.cp={cp}", get("model_type")
    if family is not None and family not in FAMILIES:
        yield (
            f"{asked} has not been shown to hold for model type {family!r}, but for {', '.join(sorted(FAMILIES))}; "
            f"set layout.cp=1"
        )
    if get("attention_dropout"):
        yield f"{asked} draws no dropout in attention; set model.config.attention_dropout=0, or layout.cp=1"
    heads = get("num_attention_heads")
    if kind == "ulysses" and isinstance(heads, int) and heads > 0 and heads % cp:
        yield (
            f"{asked} does not divide model.config.num_attention_heads={heads}; set layout.cp="
            f"{near_divisors(cp, heads)}, or layout.cp_attention=all_gather"
        )
