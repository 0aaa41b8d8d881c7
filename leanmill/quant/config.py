"""What configurations of quantised weights share. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from leanmill.core.config import Config
from leanmill.core.errors import ConfigError
from leanmill.core.lengths import steps_of
from leanmill.core.technique import TechniqueConfig, WeightTechniqueConfig


class Warmup(TechniqueConfig):
    """Mixed into techniques whose rounding may set in by and by."""

    warmup_steps: int | float = Field(default=0, ge=0)
    """Steps (int), or share of the run (float below 1), in which operands go from full precision to rounded ones:
    x + lambda (Q(x) - x), lambda growing linearly from 0 to 1. For models that were trained without rounding."""

    @model_validator(mode="after")
    def _warmup_is_a_share(self) -> Warmup:
        if isinstance(self.warmup_steps, float) and self.warmup_steps >= 1:
            raise ConfigError(
                f"{self._type}.warmup_steps={self.warmup_steps}: a float is a share of the run and must be below 1; "
                f"type warmup_steps: {round(self.warmup_steps)} for steps"
            )
        return self

    @property
    def has_warmup(self) -> bool:
        """Whether there is any."""
        return self.warmup_steps > 0

    @property
    def _type(self) -> str:
        return str(type(self).model_fields["type"].default)

    def problems_in_a_run_of(self, num_steps: int) -> Iterator[str]:
        steps = steps_of(self.warmup_steps, num_steps, at_least=1)
        if steps and steps >= num_steps:
            name = f"{self._type}.warmup_steps"
            remedy = f"set {name} below {num_steps}, e.g. 0.2" if num_steps > 1 else f"leave {name} out"
            yield (
                f"{name}={self.warmup_steps} is not over before the last of {num_steps} steps, so no step would "
                f"train what is exported; {remedy}"
            )


class LayerBits(TechniqueConfig):
    """Mixed into techniques whose weights may have different bits in different layers."""

    bits_per_layer: dict[str, int] = Field(default_factory=dict)
    """Bits of some weights by pattern, of which the last that matches counts; the others have `weight_bits`. What a
    search over bits returns."""

    @model_validator(mode="after")
    def _bits_have_a_grid(self) -> LayerBits:
        low, high = self._range_of_bits
        for pattern, bits in self.bits_per_layer.items():
            if not low <= bits <= high:
                name = type(self).model_fields["type"].default
                raise ConfigError(
                    f"{name}.bits_per_layer: {bits} bits for {pattern!r} have no grid; type {low} to {high}, or add "
                    f"{pattern!r} to {name}.exclude"
                )
        return self

    @property
    def _range_of_bits(self) -> tuple[int, int]:
        return 2, 8


class BitsPhase(Config):
    """A phase at the start of a run in which weights have more bits."""

    bits: int = Field(ge=2, le=8)
    """Bits of a weight; one whose own are more has those."""
    until: int | float = Field(gt=0)
    """When the phase ends: in steps (int), or as a share of the run (float below 1)."""

    @model_validator(mode="after")
    def _until_is_a_share(self) -> BitsPhase:
        if isinstance(self.until, float) and self.until >= 1:
            raise ConfigError(
                f"bits_schedule.until={self.until}: a float is a share of the run and must be below 1; type until: "
                f"{round(self.until)} for steps"
            )
        return self


class BitNetInputs(TechniqueConfig):
    """Mixed into techniques whose layers may treat their input as BitNet's do."""

    activation_bits: Literal[8] | None = None
    """8 rounds each token of the input to 8-bit codes by its largest magnitude, as BitNet does; None leaves
    activations alone (Spectra's TriLM)."""
    input_norm: bool = False
    """Divide each token of the input by its root mean square first, as inside of BitNet's layers. Layers right
    behind a norm of the model have that already: those of attention's output and of an MLP's have not, unless the
    model is of the family `bitnet`."""


class SharedScales(WeightTechniqueConfig):
    """Base of techniques whose scales are shared by a weight, a row or a group of a row."""

    granularity: Literal["tensor", "row", "group"] = "row"
    """What shares a scale: a whole weight (each expert of a stacked one), an output row, or
    `group_size` neighbours of a row."""
    group_size: int | None = Field(default=None, ge=2)
    """Neighbours along the last dim that share a scale, for `granularity: group`."""

    @model_validator(mode="after")
    def _group_size_belongs_to_groups(self) -> SharedScales:
        if (self.granularity == "group") != (self.group_size is not None):
            given = "without" if self.group_size is None else f"with granularity {self.granularity} and"
            name = type(self).model_fields["type"].default
            raise ConfigError(
                f"{name} {given} group_size {self.group_size}; set granularity: group and e.g. group_size: 128 "
                f"together, or neither"
            )
        return self
