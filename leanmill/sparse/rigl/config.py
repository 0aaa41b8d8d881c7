"""Configuration of SET and RigL. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from leanmill.core.errors import ConfigError
from leanmill.core.technique import Installation, InstallContext, WeightTechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class Rigl(WeightTechniqueConfig):
    """Sparse from start to end, with masks that move (RigL: Evci et al. 2020, arXiv:1911.11134).

    Every `update_every_steps` steps the smallest active weights of each layer are dropped and as many
    others grown, where the dense gradient is largest (`rigl`) or at random (`set`). Which weights are
    active follows no pattern; how many stays exact in every layer.
    """

    type: Literal["rigl"] = "rigl"
    """Name of the technique."""
    method: Literal["rigl", "set"] = "rigl"
    """What is grown: `rigl` by the dense gradient, in place of the optimizer's step; `set` at random after it
    (SET: Mocanu et al. 2018, arXiv:1707.04780)."""
    density: float = Field(default=0.1, gt=0, lt=1)
    """Share of all targeted weights together that is active."""
    distribution: Literal["erk", "uniform"] = "erk"
    """Densities of layers: `erk` proportional to (out + in) / (out in), dense where that exceeds 1; `uniform`
    the same everywhere."""
    scope: Literal["layer", "global"] = "layer"
    """What is compared when masks move: the weights of each layer, whose density stays, or all of them together, so
    that densities of layers move too and only the whole's stays, as Dynamic Sparse Learning has it (Wang et al. 2024,
    arXiv:2402.02855)."""
    start: Literal["random", "magnitude"] = "random"
    """First masks: `random` as in the paper, or the largest weights (`magnitude`), for a model that is loaded."""
    update_every_steps: int = Field(default=100, ge=1)
    """Optimizer steps between updates (Delta T in the paper)."""
    drop_fraction: float = Field(default=0.3, ge=0, le=1)
    """Share of the active weights dropped at the beginning (alpha); falls to 0 as a cosine. 0 keeps the first masks."""
    update_until: float = Field(default=0.75, gt=0, le=1)
    """Share of the run after which masks rest (T_end)."""

    def reads_optimizer_state(self) -> bool:
        """Moments of dropped and grown weights are zeroed."""
        return True

    def problems_in_a_run_of(self, num_steps: int) -> Iterator[str]:
        # The last update comes before this step.
        end = math.ceil(self.update_until * num_steps)
        if self.drop_fraction > 0 and self.update_every_steps >= end:
            remedy = f"set it to at most {end - 1}" if end > 1 else "train for longer"
            yield (
                f"rigl.update_every_steps={self.update_every_steps} moves no mask in {num_steps} steps, of which those "
                f"from {end} on have masks at rest; {remedy}, or type drop_fraction: 0 to keep the first masks"
            )

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Put a mask on every target.

        Raises:
            ConfigError: A layer would have no active weight, or there is no seed for `set`.
        """
        from leanmill.sparse.rigl.density import active_counts
        from leanmill.sparse.rigl.rule import MoveMasks, Schedule
        from leanmill.sparse.rigl.stage import MovingMask

        if self.method == "set" and context.seed is None:
            raise ConfigError("rigl.method=set grows at random and was given no seed; set `seed: 0` in the recipe")
        selected = sites.select(self.targets, self.exclude)
        owners = {id(site.raw_weight): site for site in reversed(selected)}  # tied weights count once
        shapes = {site.site_name: tuple(site.raw_weight.shape) for site in owners.values()}
        counts = active_counts(shapes, self.density, self.distribution)
        for name, count in counts.items():
            if count == 0:
                raise ConfigError(
                    f"rigl.density={self.density:g} leaves none of the weights of {name} {list(shapes[name])}; "
                    f"raise it, or add {name!r} to rigl.exclude"
                )
        sites.put(
            selected,
            lambda site: MovingMask(
                site.raw_weight.shape,
                counts[owners[id(site.raw_weight)].site_name],
                self.start,
                device=site.raw_weight.device,
            ),
        )
        schedule = Schedule(
            every_steps=self.update_every_steps, drop_fraction=self.drop_fraction, until=self.update_until
        )
        rule = MoveMasks(sites.model, self.method, schedule, seed=context.seed or 0, scope=self.scope)
        return Installation(step_rules=(rule,))
