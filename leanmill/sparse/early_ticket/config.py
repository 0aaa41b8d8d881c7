"""Configuration of early tickets. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from leanmill.core.technique import Installation, InstallContext
from leanmill.sparse.units import UnitsConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class EarlyTicket(UnitsConfig):
    """Prune at once, as soon as what would be pruned has settled (Early-Bird: You et al. 2020, arXiv:1909.11957).

    Training begins dense. Every so many steps the mask of the largest weights is found, and when it is near enough to
    those of the last few times it is drawn and stays.
    """

    type: Literal["early_ticket"] = "early_ticket"
    """Name of the technique."""
    sparsity: float = Field(default=0.5, gt=0, lt=1)
    """Share of the targeted weights that the ticket leaves out."""
    compare_every_steps: int = Field(default=100, ge=1)
    """Optimizer steps between two masks; the paper compares once an epoch."""
    num_masks: int = Field(default=5, ge=2, le=8)
    """Masks that must agree, the newest with each of the others."""
    tolerance: float = Field(default=0.1, gt=0, le=1)
    """Share of weights in which masks may differ, at most, and still agree."""
    latest: float = Field(default=0.5, gt=0, le=1)
    """Share of the run after which the ticket is drawn in any case."""

    def reads_optimizer_state(self) -> bool:
        """Moments of pruned weights are zeroed."""
        return True

    def problems_in_a_run_of(self, num_steps: int) -> Iterator[str]:
        most = int(self.latest * num_steps) // self.num_masks
        if self.compare_every_steps > most:
            remedy = (
                f"set early_ticket.compare_every_steps to at most {most}"
                if most
                else f"set train.steps to {math.ceil(self.num_masks / self.latest)} or more, or lower "
                f"early_ticket.num_masks"
            )
            yield (
                f"early_ticket compares {self.num_masks} masks of {self.compare_every_steps} steps, and draws at the "
                f"latest at {self.latest:g} of {num_steps} steps, before there are as many; {remedy}"
            )

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Put a mask that keeps everything, for now, on every target.

        Raises:
            ConfigError: Blocks do not divide a target, or a layer would have nothing left.
        """
        from leanmill.sparse.early_ticket.rule import DrawTicket
        from leanmill.sparse.early_ticket.stage import TicketMask

        selected, unit = sites.select(self.targets, self.exclude), self.unit()
        for site in selected:
            self.check_target(site.site_name, tuple(site.raw_weight.shape), self.sparsity)
        sites.put(selected, lambda site: TicketMask(site.raw_weight.shape, device=site.raw_weight.device))
        rule = DrawTicket(
            sites.model,
            unit,
            self.scope,
            sparsity=self.sparsity,
            every_steps=self.compare_every_steps,
            num_masks=self.num_masks,
            tolerance=self.tolerance,
            latest=self.latest,
        )
        return Installation(step_rules=(rule,))
