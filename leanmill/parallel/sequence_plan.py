"""Which models may have their tokens split over the ranks that share matmuls. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo", "olmo2", "phi", "phi3"})
"""Compared with one process, parameter by parameter."""
DROPOUT = ("resid_pdrop", "hidden_dropout", "hidden_dropout_prob", "dropout")
"""Of the residual stream, by the names of families."""


def sequence_problems(config: Any, tp: int) -> Iterator[str]:
    """Yield why the tokens of a model cannot be split.

    Args:
        config: The family's config: a mapping or a transformers config; what it leaves out is not judged.
        tp: Ranks that share matmuls.
    """
    get = config.get if isinstance(config, dict) else lambda key: getattr(config, key, None)
    asked, family = "layout.sequence_parallel", get("model_type")
    if family is not None and family not in FAMILIES:
        yield (
            f"{asked} has not been shown to hold for model type {family!r}, but for {', '.join(sorted(FAMILIES))}; set "
            f"{asked}=false"
        )
    for key in DROPOUT:
        if get(key):
            yield (
                f"{asked}: the {tp} ranks of layout.tp would drop the same places of different tokens by "
                f"model.config.{key}={get(key)}; set it to 0, or {asked}=false"
            )
