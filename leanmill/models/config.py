"""Which model a recipe trains. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from leanmill.core.config import Config
from leanmill.core.errors import ConfigError


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

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if (self.config is None) == (self.path is None):
            both = "both are" if self.config is not None else "neither is"
            raise ConfigError(
                f"give exactly one of model.config (random weights) and model.path (a checkpoint), {both} given; "
                f"type e.g. model.path=Qwen/Qwen3-0.6B, and model.config=null to drop a config"
            )
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ConfigError("model.config needs a model_type of transformers; add e.g. model_type: llama")
        if self.config is not None and self.revision is not None:
            raise ConfigError("model.revision belongs to a hub checkpoint; give model.path, or remove it")
        return self
