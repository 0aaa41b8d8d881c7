"""Which model a recipe trains. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from leanmill.core.config import Config
from leanmill.core.errors import ConfigError
from leanmill.core.technique import ModelTask
from leanmill.models.mixture.config import MixtureConfig
from leanmill.models.mixture.translate import Mixture, translate


FrozenDtype = Literal["auto", "fp32", "bf16", "int8", "int4", "int2", "nf4", "nf3", "nf2", "stored"]


class ModelConfig(Config):
    """A Hugging Face model: from a config (random weights) or from a checkpoint (exactly one)."""

    task: ModelTask = "causal_lm"
    """What the model is for: `causal_lm` predicts the next token. Encoders, whose tokens attend both ways (BERT and its
    family), are a `masked_lm`, which predicts tokens hidden from it, or an `embedding`, one vector for a text."""
    pooling: Literal["auto", "mean", "cls"] = "auto"
    """How hidden states become the vector of `task: embedding`: their mean over the text's tokens, or that of the first
    token. `auto` is what `path` was trained with, where it says so as sentence-transformers does, else `mean`."""
    normalise: bool | None = None
    """Whether that vector is brought to length 1; None as `path` says, else it is not."""

    config: dict[str, Any] | None = None
    """transformers config as a mapping, `model_type` included; weights are drawn from `seed`."""
    moe: MixtureConfig | None = None
    """Experts of a new model, beside `config`, whose `model_type` may then be missing: the family is chosen."""
    path: str | None = None
    """Local folder or hub name of a checkpoint, safetensors only; or a run folder of Leanmill, whose newest checkpoint
    is then written as a model to the folder `models` in it."""
    revision: str | None = None
    """Hub revision of `path`."""
    trust_remote_code: bool = False
    """Run Python code that comes with `path`."""
    attention: Literal["auto", "eager", "sdpa", "flex_attention", "per_document"] = "auto"
    """Attention implementation; `auto` is, where documents are packed and the family has it, flex_attention on CUDA and
    `per_document` on a CPU, else sdpa. `per_document` runs sdpa on each document of a row alone, so that nothing is
    multiplied that a mask would drop; compiled blocks (`train.compile`) do not take it."""
    max_context: int | None = Field(default=None, ge=1)
    """Longest context, tokens; None reads `max_position_embeddings`."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Share dropped in every dropout that the family has; None is what the model's config says (GPT-2 and OPT: 0.1)."""

    frozen_dtype: FrozenDtype = "auto"
    """How weights that a technique freezes (`lora`, say) are kept; the run computes with what that decodes to.

    `auto` is bf16 where the run computes in bf16, fp32 else. `int8` has a scale a row; the others one for 64
    neighbours: integers, or the levels of QLoRA's NormalFloat. `stored` is what the pass that wrote the folder `path`
    made of each weight (`lq_lora`), so that nothing is rounded again. Embedding and head are kept in bf16 at least."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if (self.config is None) == (self.path is None):
            both = "both are" if self.config is not None else "neither is"
            raise ConfigError(
                f"give exactly one of model.config (random weights) and model.path (a checkpoint), {both} given; "
                f"type e.g. model.path=Qwen/Qwen3-0.6B, and model.config=null to drop a config"
            )
        if self.moe is not None and self.config is None:
            raise ConfigError(
                "model.moe describes a new model, and model.path one that is there; remove model.moe, or give "
                "model.config"
            )
        if self.task != "causal_lm":
            self._check_encoder()
        if self.task != "embedding" and (self.pooling != "auto" or self.normalise is not None):
            key = "pooling" if self.pooling != "auto" else "normalise"
            raise ConfigError(
                f"model.{key} is of one vector for a text, and model.task={self.task}; remove it, or set "
                f"model.task=embedding"
            )
        if self.moe is not None:
            translate(self.moe, self.config or {})  # raises where no family has it
        elif self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ConfigError("model.config needs a model_type of transformers; add e.g. model_type: llama")
        if self.config is not None and self.revision is not None:
            raise ConfigError("model.revision belongs to a hub checkpoint; give model.path, or remove it")
        return self

    def _check_encoder(self) -> None:
        if self.moe is not None:
            raise ConfigError(f"model.moe makes mixtures of causal models, and model.task={self.task}; remove one")
        if self.attention in ("flex_attention", "per_document"):
            raise ConfigError(
                f"model.attention={self.attention} has no mask for model.task={self.task}; set model.attention=sdpa, "
                f"or leave it out"
            )

    @property
    def mixture(self) -> Mixture | None:
        """What `moe` comes to, if it is given."""
        return None if self.moe is None else translate(self.moe, self.config or {})

    @property
    def family_config(self) -> dict[str, Any] | None:
        """`config` as transformers gets it: what `moe` says written in."""
        mixture = self.mixture
        return self.config if mixture is None else mixture.config
