"""Configuration of integer quantisation with scales taken from the values. Imports no torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.lengths import steps_of
from leanmill.core.technique import Installation, InstallContext
from leanmill.quant.config import BitsPhase, LayerBits, SharedScales, Warmup


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class IntQuant(LayerBits, Warmup, SharedScales):
    """Weights, and activations if asked, on a symmetric integer grid, trained straight-through.

    The scale is computed from the values at every forward: quantisation-aware training as in Jacob et
    al. 2018 (arXiv:1712.05877), with signed symmetric codes.
    """

    type: Literal["int_quant"] = "int_quant"
    """Name of the technique."""
    weight_bits: int = Field(default=4, ge=2, le=8)
    """Bits b of a weight; codes are -(2^(b-1) - 1) to 2^(b-1) - 1."""
    bits_schedule: list[BitsPhase] = Field(default_factory=list)
    """Phases of more bits before `weight_bits`, such as 8 until 0.3 and 4 until 0.6 of the run."""
    switch_bits: list[int] = Field(default_factory=list)
    """Double Rounding: widths, such as [8, 6, 4, 2], that all round the codes of the most bits once more. Steps train
    them in turn, evaluations and exports have `weight_bits`, and `leanmill export --bits` gives each of them."""
    activation_bits: int | None = Field(default=None, ge=2, le=8)
    """Bits of an activation, one absmax scale a token; None leaves activations alone."""
    scale: Literal["absmax", "mse"] = "absmax"
    """Of weights. `absmax`: the largest magnitude is the outermost code. `mse`: of 40 shares of that
    scale, from 1 down to 0.22, the one with the least squared error; about 40 times the work."""

    @model_validator(mode="after")
    def _widths_fit(self) -> IntQuant:
        widths = self.switch_bits
        if not widths:
            return self
        if len(set(widths)) < 2 or len(set(widths)) < len(widths) or not all(2 <= bits <= 8 for bits in widths):
            raise ConfigError(
                f"int_quant.switch_bits={widths}: type two or more different widths from 2 to 8, e.g. [8, 6, 4, 2]"
            )
        if self.weight_bits not in widths:
            raise ConfigError(
                f"int_quant.weight_bits={self.weight_bits} is what evaluations and exports have unless told, and not "
                f"among switch_bits {widths}; set weight_bits: {widths[-1]}"
            )
        for key in ("bits_schedule", "bits_per_layer"):
            if getattr(self, key):
                raise ConfigError(
                    f"int_quant.{key} with switch_bits: widths that take turns are the same in all layers and steps; "
                    f"remove one of them"
                )
        return self

    @model_validator(mode="after")
    def _bits_fall(self) -> IntQuant:
        least = min((self.weight_bits, *self.bits_per_layer.values()))
        bits = [phase.bits for phase in self.bits_schedule]
        if bits and any(after >= before for before, after in itertools.pairwise((*bits, least))):
            raise ConfigError(
                f"int_quant.bits_schedule: phases of {', '.join(map(str, bits))} bits and then {least} do not fall "
                f"from each to the next; type ever fewer bits, all above {least}, or remove the phase that is not"
            )
        return self

    def problems_in_a_run_of(self, num_steps: int) -> Iterator[str]:
        yield from super().problems_in_a_run_of(num_steps)
        ends = [steps_of(phase.until, num_steps, at_least=1) for phase in self.bits_schedule]
        if ends and ends != sorted(set(ends)):
            yield (
                f"int_quant.bits_schedule: of {num_steps} steps the phases end at {ends}, not each after the one "
                f"before; set `until` in ascending order"
            )
        if ends and ends[-1] >= num_steps:
            yield (
                f"int_quant.bits_schedule is not over before the last of {num_steps} steps, so no step would train "
                f"what is exported; end its last phase earlier, e.g. until: 0.6"
            )
        if len(self.switch_bits) > num_steps:
            yield (
                f"int_quant.switch_bits has {len(self.switch_bits)} widths and the run {num_steps} steps, so some are "
                f"never trained; set train.steps to {len(self.switch_bits)} or more"
            )

    def holds_where_matmuls_are_shared(self) -> bool:
        """Return True: stages see whole weights and whole activations."""
        return True

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Put a quantiser on every target, and one on its input.

        Raises:
            ConfigError: `group_size` does not divide the last dim of a target, or `bits_per_layer` names none.
        """
        from leanmill.quant.bits import LowerBits, TakeTurns, bits_by_site
        from leanmill.quant.int_quant.stage import IntActivations, IntWeights
        from leanmill.quant.scales import check_groups
        from leanmill.quant.warmup import warmup_rules

        selected = sites.select(self.targets, self.exclude)
        check_groups(selected, self.type, self.group_size)
        bits = bits_by_site(selected, self.weight_bits, self.bits_per_layer, self.type)
        sites.put(
            selected,
            lambda site: IntWeights(
                bits[site.site_name], self.scale, self.granularity, self.group_size,
                widths=self.switch_bits, has_warmup=self.has_warmup, device=site.raw_weight.device,
            ),
        )  # fmt: skip
        if self.activation_bits is not None:
            for site in selected:
                device = site.raw_weight.device
                site.put_input(IntActivations(self.activation_bits, has_warmup=self.has_warmup, device=device))
        rules = list(warmup_rules(sites, self.type, self.warmup_steps))
        if self.bits_schedule:
            phases = [(phase.bits, phase.until) for phase in self.bits_schedule]
            rules.append(LowerBits(sites.model, self.type, bits, phases))
        if self.switch_bits:
            rules.append(TakeTurns(sites.model, self.type, bits, self.switch_bits))
        return Installation(step_rules=rules)
