"""Configuration of mixed-precision experts. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.passes import ExpertPassConfig, ExpertSolver


if TYPE_CHECKING:
    from torch import nn

    from leanmill.core.probes import Probe


class McMoe(ExpertPassConfig):
    """Quantise each expert to the 1 to 3 bits that an integer program gives it (Huang et al. 2024, arXiv:2410.06270).

    The program is solved exactly for each layer; weights are rounded by GPTQ to grids of 2^b levels.
    """

    type: Literal["mc_moe"] = "mc_moe"
    """Name of the pass."""
    average_bits: float = Field(default=2.0, ge=1, le=3)
    """Bits of a weight of an expert, on average over the experts of a layer."""
    frequency_power: float = Field(default=1.0, ge=0)
    """The paper's alpha: of how often an expert is chosen."""
    weight_power: float = Field(default=1.5, ge=0)
    """The paper's beta: of its mean combine weight over all tokens."""
    error_power: float = Field(default=2.0, ge=0)
    """The paper's gamma: of the error in the layer's output that rounding it makes. The authors' code raises it to
    alpha instead."""
    group_size: int | None = Field(default=128, ge=2)
    """Neighbours in a row that share a scale; None is one scale a row."""
    damping: float = Field(default=0.01, gt=0)
    """Added to the diagonal of the Hessian, as a share of its mean."""
    leaves_out_second: bool = False
    """At inference a token does without its second expert where its weight is, against that of the first, below the
    layer's median on calibration text. For models of two experts a token; `leanmill eval` does it."""
    protected_share: float = Field(default=0.02, ge=0, le=1)
    """Share of a row's tokens that keep both experts: those that matter most to others."""

    @model_validator(mode="after")
    def _protects_something(self) -> Self:
        # By value: a saved recipe names every key.
        if not self.leaves_out_second and self.protected_share != type(self).model_fields["protected_share"].default:
            raise ConfigError(
                "mc_moe.protected_share says who keeps the second expert where others do without; set "
                "leaves_out_second: true, or remove it"
            )
        return self

    def at_inference(self, model: nn.Module, layers: Mapping[int, Mapping[str, float]]) -> Sequence[Probe]:
        from leanmill.moe.mc_moe.second import leave_out_second

        thresholds = {layer: found["threshold"] for layer, found in layers.items()}
        return [leave_out_second(model, thresholds, protected_share=self.protected_share)]

    def solver(self) -> ExpertSolver:
        from leanmill.moe.mc_moe.solver import McMoeSolver

        return McMoeSolver(
            average_bits=self.average_bits,
            powers=(self.frequency_power, self.weight_power, self.error_power),
            group_size=self.group_size,
            damping=self.damping,
            leaves_out_second=self.leaves_out_second,
        )
