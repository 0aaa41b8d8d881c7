"""Which model a recipe trains. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from leanmill.core.config import Config


class ModelConfig(Config):
    """A Hugging Face causal LM: from a config (random weights) or from a checkpoint (exactly one)."""

    config: dict[str, Any] | None = None
    """transformers config as a mapping, `model_type` included; weights are drawn from `seed`."""
    path: str | None = None
    """Local folder or hub name of a checkpoint; safetensors only."""
    revision: str | None = None
    """Hub revision of `path`."""
    trust_remote_code: bool = False
    """Run Python code that comes with `path`."""
    attention: Literal["auto", "eager", "sdpa", "flex_attention"] = "auto"
    """Attention implementation; `auto` is flex_attention on CUDA when documents are packed, else sdpa."""
    max_context: int | None = Field(default=None, ge=1)
    """Longest context, tokens; None reads `max_position_embeddings`."""
