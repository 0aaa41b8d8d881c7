"""How many bits each weight has, and when: bits by layer, schedules of bits, and widths that take turns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn

from leanmill.core.errors import ConfigError
from leanmill.core.lengths import steps_of
from leanmill.core.near import near_names
from leanmill.core.rules import StepContext, StepRule
from leanmill.core.site import Site
from leanmill.core.sites import iter_sites, matches
from leanmill.core.stage import Stage


def bits_by_site(
    selected: Sequence[Site], num_bits: int, by_pattern: Mapping[str, int], technique: str
) -> dict[str, int]:
    """Return the bits of every selected site by its name: those of the last pattern that matches it, else `num_bits`.

    Raises:
        ConfigError: A pattern matches none of them, or sites that share a weight get different bits.
    """
    names = [site.site_name for site in selected]
    bits = dict.fromkeys(names, num_bits)
    for pattern, wanted in by_pattern.items():
        found = [name for name in names if matches(pattern, name)]
        if not found:
            near = near_names(pattern, names, count=2, cutoff=0.3) or names[:2]
            raise ConfigError(
                f"{technique}.bits_per_layer: {pattern!r} matches no weight that {technique} takes; near names: "
                f"{', '.join(near)}"
            )
        bits |= dict.fromkeys(found, wanted)
    of_weight: dict[int, str] = {}
    for site in selected:
        first = of_weight.setdefault(id(site.raw_weight), site.site_name)
        if bits[first] != bits[site.site_name]:
            raise ConfigError(
                f"{technique}.bits_per_layer gives {first} {bits[first]} bits and {site.site_name} "
                f"{bits[site.site_name]}, but both are one weight; give both the same"
            )
    return bits


class SwitchedBits(Stage):
    """Mixed into stages of weights that round to other bits when they are told to (`switch_to`)."""

    own_bits: int
    """What the weight has once training is over, unless an export asks for other ones."""


class LowerBits(StepRule):
    """Gives weights more bits at first, and from phase to phase fewer, down to their own.

    Args:
        model: Whose sites are walked.
        technique: Whose rule it is.
        names: Of the sites.
        phases: Bits, and when they end, in steps (int) or as a share of the run (float), in order.
    """

    def __init__(
        self, model: nn.Module, technique: str, names: Iterable[str], phases: Sequence[tuple[int, int | float]]
    ) -> None:
        self.model, self.names, self.phases = model, frozenset(names), tuple(phases)
        self.name = f"{technique}_bits"
        self.least = 0

    def begin_step(self, context: StepContext) -> None:
        ends = [(bits, steps_of(until, context.num_steps, at_least=1)) for bits, until in self.phases]
        self.least = next((bits for bits, end in ends if context.step < end), 0)
        for stage in _stages(self.model, self.names):
            stage.switch_to(max(self.least, stage.own_bits))

    def metrics(self) -> Mapping[str, float]:
        return {"least": float(self.least)}


class TakeTurns(StepRule):
    """Trains weights in one of several widths a step, in turn; they are evaluated in their own.

    Args:
        model: Whose sites are walked.
        technique: Whose rule it is.
        names: Of the sites.
        widths: Bits; a step of each, in this order.
    """

    def __init__(self, model: nn.Module, technique: str, names: Iterable[str], widths: Sequence[int]) -> None:
        self.model, self.names, self.widths = model, frozenset(names), tuple(widths)
        self.name = f"{technique}_turns"

    def begin_step(self, context: StepContext) -> None:
        trains = context.views is not None
        for stage in _stages(self.model, self.names):
            stage.switch_to(self.widths[context.step % len(self.widths)] if trains else stage.own_bits)

    def after_optimizer(self, context: StepContext) -> None:
        for stage in _stages(self.model, self.names):
            stage.switch_to(stage.own_bits)


def _stages(model: nn.Module, names: frozenset[str]) -> Iterator[SwitchedBits]:
    for name, site in iter_sites(model):
        if name in names:
            yield from (stage for stage in site.weight_stages() if isinstance(stage, SwitchedBits))
