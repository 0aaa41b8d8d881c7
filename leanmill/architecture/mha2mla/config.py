"""MHA2MLA. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.surgery import Surgeon, SurgeryConfig


class Mha2Mla(SurgeryConfig):
    """Give a model multi-head latent attention by leaving RoPE to a few frequencies of each head.

    Ji et al. 2025, arXiv:2502.14837. Of each key-value head the frequencies that contribute most to its scores stay
    rotary; what is left of the keys and the values are factored together by a truncated singular value decomposition
    into one latent, which is all that a cache keeps beside the rotary parts. The model becomes a `latent_llama`, and a
    phase that trains it behind this pass heals what leaving out rotations cost: a few thousandths of its pre-training
    text in the paper.
    """

    type: Literal["mha2mla"] = "mha2mla"
    """Name of the pass."""
    kv_lora_rank: Annotated[int, Field(ge=1, strict=True)]
    """Numbers of the latent, a token and layer."""
    rope_head_dim: Annotated[int, Field(ge=2, strict=True)]
    """Numbers of each key that stay rotary, an even number below the size of a head."""
    frequencies: Literal["contribution", "high", "low", "uniform"] = "contribution"
    """Which stay: of each head those of the largest mean norm of queries times mean norm of keys on calibration rows,
    the query heads that share a key summed (the paper's 2-norm); or of all heads the highest, the lowest, or every
    so many."""

    @model_validator(mode="after")
    def _check_even(self) -> Mha2Mla:
        if self.rope_head_dim % 2:
            raise ConfigError(
                f"mha2mla: rope_head_dim={self.rope_head_dim} is odd, and rotations take pairs; give an even number"
            )
        return self

    @property
    def looks(self) -> bool:
        return self.frequencies == "contribution"

    def surgeon(self, seed: int) -> Surgeon:
        from leanmill.architecture.mha2mla.surgeon import Mha2MlaSurgeon

        return Mha2MlaSurgeon(rank=self.kv_lora_rank, rope_dim=self.rope_head_dim, frequencies=self.frequencies)
