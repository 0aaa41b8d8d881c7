"""Configuration of floating-point quantisation. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import field_validator, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.technique import Installation, InstallContext
from leanmill.quant.config import SharedScales, Warmup
from leanmill.quant.fp_quant.formats import FloatFormat, candidates_of, format_of


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class FpQuant(Warmup, SharedScales):
    """Weights, and activations if asked, in floating-point formats of 2 to 19 bits, trained straight-through.

    Block formats are OCP Microscaling's (Rouhani et al. 2023, arXiv:2310.10537) and NVFP4, value for value torchao's;
    plain ones take a scale of any granularity, whose search is that of exponent biases (LLM-FP4: Liu et al. 2023,
    arXiv:2310.16836); `scale: none` simulates training in fewer bits (Lee et al. 2024, arXiv:2405.18710).
    """

    type: Literal["fp_quant"] = "fp_quant"
    """Name of the technique."""
    weight_format: str = "mxfp4"
    """Of weights: a block format (mxfp4, mxfp6_e2m3, mxfp6_e3m2, mxfp8_e4m3, mxfp8_e5m2, mxint4, mxint8: 32 neighbours;
    nvfp4: 16), a plain one by its bits of exponent and mantissa (e2m1, e1m2, e3m0, e4m3 and so on), or fp4, fp6 or
    fp8: whichever division of the bits has the least squared error, for each weight anew."""
    activation_format: str | None = None
    """Of activations, as above but for fp4, fp6 and fp8; a plain one has an absmax scale a token. None leaves
    activations alone."""
    gradient_format: str | None = None
    """Of the gradients of what layers compute, as activations': rounded once, for the gradient of the input and that of
    the weight alike. None leaves gradients alone."""
    granularity: Literal["tensor", "row", "group"] | None = None  # type: ignore[assignment]
    """What shares a scale in a plain format: a whole weight (each expert of a stacked one), an output row, or
    `group_size` neighbours of a row; None is a row. Block formats have their own."""
    scale: Literal["absmax", "mse", "power_of_two", "none"] | None = None
    """Of a plain format. `absmax`: the largest magnitude is the largest value. `mse`: of 40 shares of that scale, from
    1 down to 0.22, the one with the least squared error. `power_of_two`: an integer exponent bias, see
    `shared_exponent`. `none`: values are rounded as they are, activations too. None is absmax, and none for
    exponents of 8 bits, which have the range of fp32."""
    shared_exponent: Literal["floor", "ceil", "mse"] = "floor"
    """Of MX blocks and of `scale: power_of_two`. `floor`: from the exponent of the largest magnitude, which may
    saturate (OCP). `ceil`: the least under which nothing does (NVIDIA). `mse`: of that and the next two below the
    one with the least squared error; of activations `ceil`."""

    @field_validator("weight_format", "activation_format", "gradient_format")
    @classmethod
    def _is_known(cls, value: str | None) -> str | None:
        if value is not None and not candidates_of(value):
            format_of(value)
        return value

    @model_validator(mode="after")
    def _fits_the_format(self) -> FpQuant:
        for key in ("activation_format", "gradient_format"):
            name = getattr(self, key)
            if name is not None and candidates_of(name):
                raise ConfigError(
                    f"fp_quant.{key}={name} would be searched for every token; type one format, e.g. "
                    f"{candidates_of(name)[-1]}"
                )
        formats = [format_of(name) for name in candidates_of(self.weight_format) or (self.weight_format,)]
        if formats[0].block_size is not None:
            for key, value in (("granularity", self.granularity), ("scale", self.scale)):
                if value is not None:
                    raise ConfigError(
                        f"fp_quant.{key}={value} is of plain formats, and {self.weight_format} has blocks of "
                        f"{formats[0].block_size}; remove it, or set weight_format: e2m1"
                    )
        if formats[0].is_unscaled and self.scale not in (None, "none"):
            raise ConfigError(
                f"fp_quant.scale={self.scale}: {self.weight_format} has the range of fp32 and takes no scale; remove it"
            )
        if self.granularity is not None and (formats[0].is_unscaled or self.scale == "none"):
            raise ConfigError(
                f"fp_quant.granularity={self.granularity}: values without a scale share none; remove it, or set scale: "
                f"absmax with another weight_format than {self.weight_format}"
            )
        uses_exponents = self.scale == "power_of_two" or any(
            f.block_scale == "power_of_two" for f in (*formats, *self._token_formats())
        )
        if self.shared_exponent != "floor" and not uses_exponents:
            raise ConfigError(
                f"fp_quant.shared_exponent={self.shared_exponent} is of MX formats and of scale: power_of_two; remove "
                f"it, or set weight_format: mxfp4"
            )
        return self

    def _token_formats(self) -> list[FloatFormat]:
        return [format_of(name) for name in (self.activation_format, self.gradient_format) if name is not None]

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Put a quantiser on every target, and one on its input and the gradient of its output.

        Raises:
            ConfigError: Blocks or `group_size` do not divide a dim of a target, or logits would get rounded gradients.
        """
        from leanmill.quant.fp_quant.stage import TokenRounding, check_gradients, make_inputs, make_weights
        from leanmill.quant.scales import check_groups
        from leanmill.quant.warmup import warmup_rules

        names = candidates_of(self.weight_format) or (self.weight_format,)
        formats = [format_of(name) for name in names]
        selected = sites.select(self.targets, self.exclude)
        tokens, gradients = (
            None if name is None else TokenRounding(format_of(name), self.scale != "none", self.shared_exponent)
            for name in (self.activation_format, self.gradient_format)
        )
        sizes = {f.block_size for f in formats} | {self.group_size, tokens.format_.block_size if tokens else None}
        for size in sizes:
            check_groups(selected, self.type, size)
        if gradients is not None:
            check_gradients(sites, selected, gradients.format_.block_size)
        sites.put(
            selected,
            lambda site: make_weights(
                formats, self.scale, self.granularity, self.group_size, self.shared_exponent,
                has_warmup=self.has_warmup, device=site.raw_weight.device,
            ),
        )  # fmt: skip
        for site in selected:
            device = site.raw_weight.device
            stage = make_inputs(tokens, gradients, has_warmup=self.has_warmup, device=device)
            if stage is not None:
                site.put_input(stage)
        return Installation(step_rules=warmup_rules(sites, self.type, self.warmup_steps))
