"""Configuration of what is measured of the loss around logits. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from leanmill.core.errors import ConfigError
from leanmill.core.technique import Installation, InstallContext, TechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class Sharpness(TechniqueConfig):
    """Measure how much the loss can rise where logits move a little, at every evaluation.

    Keskar et al.'s measure (2017, arXiv:1609.04836) over the logits instead of the weights, which is reported to
    grow before training in few bits diverges (Lee et al. 2024, arXiv:2405.18710; not repeated here). It changes no
    result.
    """

    type: Literal["sharpness"] = "sharpness"
    """Name of the technique."""
    radius: float = Field(default=5e-4, gt=0, lt=1)
    """How far each logit z may move, as a share of |z| + 1."""

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Look on at evaluations.

        Raises:
            ConfigError: The model's family changes logits after the head in a way that is not known.
        """
        from leanmill.core.head import head_extras, known_head_form
        from leanmill.quant.sharpness.probe import LogitSharpness

        config = sites.model.config
        extras = head_extras(config)
        if extras and known_head_form(config) is None:
            raise ConfigError(
                f"sharpness: this model changes its logits after the head ({', '.join(extras)}), which is not covered; "
                f"remove sharpness from techniques"
            )
        return Installation(probes=(LogitSharpness(sites.model, self.radius),))
