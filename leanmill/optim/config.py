"""How weights move. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from leanmill.core.config import Config


_Beta = Annotated[float, Field(ge=0, lt=1)]


class LookaheadConfig(Config):
    """Lookahead over the chosen optimizer (Zhang et al. 2019, arXiv:1907.08610)."""

    every: int = Field(default=5, ge=1)
    """Steps between slow-weight updates (k in the paper)."""
    alpha: float = Field(default=0.5, gt=0, le=1)
    """Slow step size; 0.5 in the paper, 0.8 in its code."""


class _OptimizerBase(Config):
    lr: float = Field(gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay; not applied to norms, biases, embeddings of 1 dim and scales."""
    lookahead: LookaheadConfig | None = None
    """Wrap in Lookahead."""

    @model_validator(mode="after")
    def _check_decay(self) -> Self:
        # A step multiplies weights by 1 - lr * weight_decay.
        if self.lr * self.weight_decay >= 1:
            raise ValueError(
                f"optimizer.lr={self.lr:g} x weight_decay={self.weight_decay:g} is at least 1, so every step would "
                f"wipe the weights out; set optimizer.weight_decay below {1 / self.lr:g}"
            )
        return self


class AdamW(_OptimizerBase):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), fused where torch has it."""

    type: Literal["adamw"] = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    betas: tuple[_Beta, _Beta] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""


class Lion(_OptimizerBase):
    """Lion (Chen et al. 2023, arXiv:2302.06675): sign of an interpolated momentum; one state tensor."""

    type: Literal["lion"] = "lion"
    lr: float = Field(default=1e-4, gt=0)
    """Peak learning rate; 3 to 10 times below AdamW's."""
    betas: tuple[_Beta, _Beta] = (0.9, 0.99)
    """Interpolation of the update, decay of the momentum."""


class Adam8bit(_OptimizerBase):
    """AdamW with 8-bit state from torchao, which must be installed."""

    type: Literal["adamw8bit"] = "adamw8bit"
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    betas: tuple[_Beta, _Beta] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""


OptimizerConfig = Annotated[AdamW | Lion | Adam8bit, Field(discriminator="type")]


_Share = Annotated[float, Field(gt=0, lt=1)]


class ScheduleConfig(Config):
    """Learning rate over the run, as a factor of the peak, and weight decay. Warm-up is linear from 0.

    The schedule of BitNet b1.58 and TriLM (Kaushal et al. 2024, arXiv:2407.12327) is `type: linear` with
    `drop_at: 0.5` and `weight_decay_until: 0.67`.
    """

    type: Literal["cosine", "linear", "wsd", "infinite", "constant"] = "cosine"
    """`wsd`: warm-up, stable, decay (arXiv:2404.06395). `infinite`: warm-up, cosine cooldown to a
    constant, then a short exponential anneal at the end (arXiv:2503.02844)."""
    warmup_steps: int | float = Field(default=0.02, ge=0)
    """Warm-up: steps (int), or share of the run (float below 1)."""
    min_factor: float = Field(default=0.1, ge=0, le=1)
    """Factor at the end of the run."""
    decay_fraction: float = Field(default=0.2, ge=0, le=1)
    """Share of the run that decays at the end (`wsd`) or anneals (`infinite`)."""
    cooldown_fraction: float = Field(default=0.3, ge=0, le=1)
    """Share of the run for the cosine cooldown (`infinite`)."""
    constant_factor: float = Field(default=0.4, gt=0, le=1)
    """Factor of the constant phase (`infinite`)."""
    drop_at: _Share | None = None
    """Share of the run after which the peak is a lower one: what `type` says is multiplied by `drop_factor`."""
    drop_factor: float = Field(default=2 / 3, gt=0, lt=1)
    """The later peak as a factor of the first; TriLM has 0.625 to 0.69."""
    weight_decay_until: _Share | None = None
    """Share of the run after which no parameter is decayed any more; TriLM 2/3, BitNet b1.58 1/2."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.warmup_steps, float) and self.warmup_steps >= 1:
            raise ValueError(
                f"schedule.warmup_steps={self.warmup_steps}: a float is a share of the run and must be below 1; "
                f"type warmup_steps: {round(self.warmup_steps)} for steps"
            )
        if self.type == "infinite":
            self._check_infinite()
        if self.drop_at is None and "drop_factor" in self.model_fields_set and self.drop_factor != 2 / 3:
            raise ValueError(
                f"schedule.drop_factor={self.drop_factor:g} without drop_at changes nothing; set schedule.drop_at, "
                f"e.g. 0.5, or remove drop_factor"
            )
        return self

    def _check_infinite(self) -> None:
        if not 0 < self.min_factor <= self.constant_factor:
            raise ValueError(
                f"schedule.min_factor={self.min_factor}: the anneal of `infinite` is exponential from "
                f"constant_factor={self.constant_factor}, so set min_factor above 0 and at most that"
            )
        if self.cooldown_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"schedule.cooldown_fraction={self.cooldown_fraction} and decay_fraction={self.decay_fraction} "
                f"add up to more than the run; give two that add up to at most 1"
            )
