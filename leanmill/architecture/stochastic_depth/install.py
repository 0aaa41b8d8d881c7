"""Putting stochastic depth and early exits around the blocks of a model."""

from __future__ import annotations

from leanmill.architecture.stochastic_depth.around import DroppedBlock, Granularity
from leanmill.architecture.stochastic_depth.early_exit import EarlyExit, Exits
from leanmill.architecture.stochastic_depth.rule import DropRule, ExitRule
from leanmill.architecture.stochastic_depth.schedule import Curriculum, OverLayers, OverTime
from leanmill.core.dataflow import check_blocks
from leanmill.core.noise import FreshNoise
from leanmill.core.rules import StepRule
from leanmill.core.sites import Sites
from leanmill.core.technique import InstallContext


_TECHNIQUE = "stochastic_depth"


def install_drops(
    sites: Sites,
    context: InstallContext,
    *,
    rate: float,
    over_layers: OverLayers,
    over_time: OverTime,
    granularity: Granularity,
    rescale: bool,
) -> list[StepRule]:
    """Let every decoder block be dropped; see `StochasticDepth` for the arguments."""
    check_blocks(sites.model, _TECHNIQUE)
    fresh = FreshNoise(sites.model, context.seed, _TECHNIQUE)
    blocks = []
    for place in sites.modules("block"):
        blocks.append(DroppedBlock(place.name, granularity, rescale))
        place.around(blocks[-1])
    rule = DropRule(blocks, fresh.seed, rate=rate, over_layers=over_layers, over_time=over_time)
    context.ledger.before_forward(rule.see)
    return [fresh, rule]


def install_exits(
    sites: Sites, context: InstallContext, *, scale: float, curriculum: Curriculum, rotation: int
) -> list[StepRule]:
    """Give every decoder block but the last an early exit; see `EarlyExitConfig` for the arguments."""
    check_blocks(sites.model, _TECHNIQUE)
    exits = Exits(sites.model, context.ledger.open("early_exit", per="token"))
    arounds = []
    for place in sites.modules("block")[:-1]:
        arounds.append(EarlyExit(exits))
        place.around(arounds[-1])
    rule = ExitRule(
        arounds,
        exits,
        context.ledger,
        weight=context.cross_entropy_weight,
        scale=scale,
        curriculum=curriculum,
        rotation=rotation,
    )
    context.ledger.before_forward(rule.see)
    return [rule]
