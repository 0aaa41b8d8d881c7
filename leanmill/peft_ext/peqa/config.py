"""Configuration of training nothing but scales. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from leanmill.core.errors import ConfigError
from leanmill.core.near import near_divisors
from leanmill.core.technique import Installation, InstallContext, TrainedTechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.site import Site
    from leanmill.core.sites import Sites


class Peqa(TrainedTechniqueConfig):
    """Round weights to integers once and train their scales alone (PEQA: Kim et al. 2023, arXiv:2305.14152).

    The model stays quantised, its memory too; another task is another set of scales over the same integers.
    """

    type: Literal["peqa"] = "peqa"
    """Name of the technique."""
    bits: Literal[2, 3, 4, 8] = 4
    """Bits of an integer; 3 are kept in 4."""
    group_size: int | None = Field(default=None, ge=1)
    """Neighbours of a row that share a scale; None gives each row one, as in the paper's main results."""
    targets: list[str] | None = None
    """Patterns of weights to take; None takes every linear and expert weight except the head."""
    exclude: list[str] = Field(default_factory=list)
    """Patterns of weights to leave out again."""

    def _size(self, site: Site) -> int:
        num_in = int(site.raw_weight.shape[-1])
        size = self.group_size or num_in
        if num_in % size:
            raise ConfigError(
                f"peqa.group_size={size} does not divide the {num_in} inputs of {site.site_name}; set group_size: "
                f"{near_divisors(size, num_in)}, or add {site.site_name!r} to peqa.exclude"
            )
        return size

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Put a decoder with trained scales on every target, and freeze everything else.

        Raises:
            ConfigError: `group_size` does not divide a weight's inputs, or a weight is tied to another.
        """
        from leanmill.peft_ext.peqa.stage import TrainedScales, keep_integers

        for site in sites.select(self.targets, self.exclude):
            tied = sites.tied_to(site)
            if tied or not site.takes_inputs:
                raise ConfigError(
                    f"peqa takes no tables, nor weights that share one: {', '.join([site.site_name, *tied])}; add them "
                    f"to peqa.exclude"
                )
            weight = site.raw_weight
            site.put(TrainedScales(weight.shape, self.bits, self._size(site), weight.device))
        return Installation(freeze_base=True, keep=keep_integers)
