"""TransMLA. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.surgery import Surgeon, SurgeryConfig


class TransMla(SurgeryConfig):
    """Give a model multi-head latent attention in the place of grouped-query attention.

    Meng et al. 2025, arXiv:2502.07864. Keys of all heads are rotated into each other, frequency by frequency, so that
    one head's width holds most of what positions tell; only that part stays rotary, and all heads share it. What is
    left of the keys and the values become one latent of few numbers, which is all that a cache keeps beside it. The
    model becomes a dense `deepseek_v3`.
    """

    type: Literal["transmla"] = "transmla"
    """Name of the pass."""
    kv_lora_rank: Annotated[int, Field(ge=2, strict=True)]
    """Numbers of the latent that keys and values come from, a token and layer. One of them is constant."""
    qk_rope_head_dim: Annotated[int, Field(ge=2, strict=True)] | None = None
    """Numbers of the rotary part that all heads share, a token and layer: the size of a head, or what divides it."""
    frequency_fold: Annotated[int, Field(ge=1, strict=True)] | None = None
    """Neighbouring frequencies that count as one where keys are rotated into each other (`freqfold`): more of what
    positions tell fits into the rotary part, at frequencies that are not quite theirs. A multiple of the size of a head
    over `qk_rope_head_dim`; None is just that."""
    q_lora_rank: Annotated[int, Field(ge=2, strict=True)] | None = None
    """Numbers of a latent that queries come from; None leaves them one matrix. Models whose queries have biases need a
    latent, since `deepseek_v3` has no such biases without one."""
    balance: bool = True
    """Whether keys are scaled to the variance of values before both share a latent; else the larger of the two, mostly
    keys, gets most of it."""

    @model_validator(mode="after")
    def _check_even(self) -> TransMla:
        if self.qk_rope_head_dim is not None and self.qk_rope_head_dim % 2:
            raise ConfigError(
                f"transmla: qk_rope_head_dim={self.qk_rope_head_dim} is odd, and rotations take pairs; give an even "
                f"number"
            )
        return self

    @property
    def looks(self) -> bool:
        return True

    def surgeon(self, seed: int) -> Surgeon:
        from leanmill.architecture.transmla.surgeon import TransMlaSurgeon

        return TransMlaSurgeon(
            kv_rank=self.kv_lora_rank,
            rope_dim=self.qk_rope_head_dim,
            fold=self.frequency_fold,
            q_rank=self.q_lora_rank,
            balance=self.balance,
        )
