"""Configuration of parameter-efficient retraining. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from leanmill.core.technique import Installation, InstallContext, WeightTechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


Part = Literal["biases", "norms", "head", "embeddings"]


class Perp(WeightTechniqueConfig):
    """Retrain a small part of a pruned model; its zeros stay (PERP, Zimmer et al. 2023, arXiv:2312.15230).

    All other parameters of the model rest, without gradients or optimizer state. `lora` beside it is the paper's
    MaskLoRA: W + s (B A) on the weights that are not zero.
    """

    type: Literal["perp"] = "perp"
    """Name of the technique."""
    train: list[Part] | None = Field(default=None, min_length=1)
    """What trains: `biases` of linear layers, `norms`, the output `head`, token `embeddings`. Each must be there;
    None takes norms, and biases where the model has some."""
    mask: bool = True
    """Keep a mask of each target's zeros, one byte a weight, which deltas (`lora`) cannot fill. False leaves it out:
    without deltas the weights rest anyway."""

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Choose what trains, freeze the rest, and put a mask on every target, to be filled from the loaded weights.

        Raises:
            ConfigError: A part that was asked for is not in the model, or is tied to one that was not.
        """
        from leanmill.core.parameters import ParamRule
        from leanmill.sparse.perp.parts import names_of
        from leanmill.sparse.perp.stage import PerpMask

        names = names_of(sites, self.train)
        for site in sites.select(self.targets, self.exclude) if self.mask else ():
            site.put(PerpMask(site.raw_weight))
        rule = ParamRule(technique=self.type, match=names.__contains__, trainable=True)
        return Installation(freeze_base=True, param_rules=(rule,))
