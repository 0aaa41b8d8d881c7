"""The one place where the loads of experts are counted, added up over a step and reduced over ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from leanmill.core.account import add_once
from leanmill.core.batches import Batch
from leanmill.core.ledger import Ledger
from leanmill.core.places import Place
from leanmill.core.rules import StepContext, StepRule
from leanmill.core.sites import Sites
from leanmill.core.stage import TechniqueModule
from leanmill.core.technique import InstallContext
from leanmill.moe.loads.tokens import TokenShare
from leanmill.moe.routing.decision import Decision, Reader, Routing
from leanmill.moe.routing.install import decisions
from leanmill.moe.routing.policy import Policy
from leanmill.parallel.collectives import reduced


class Sum(TechniqueModule):
    """Numbers that one place of the model adds up over the tokens of a micro-batch. Made by `Loads.open`.

    Keep it in a module of the place, so that compiled blocks find their own one.
    """

    value: Tensor
    """fp32 [N]: of the micro-batch under way, on this rank."""

    def __init__(self, name: str, size: int) -> None:
        super().__init__()
        self.name = name
        self.register_buffer("value", torch.zeros(size), persistent=False)

    def add(self, value: Tensor) -> None:
        """Add fp32 [N], unless a forward is only being recomputed."""
        add_once(self.value, value)


class Demand:
    """In which steps somebody reads the sums; one of a run."""

    is_open: bool = True
    """Whether in the step under way."""
    every_step: bool = False
    """Whether somebody does in all; else where metrics are reported."""


class RouterLoads(Reader):
    """Counts what one router chooses, copies that are dropped afterwards included."""

    technique = "router_loads"

    def __init__(self, layer: int, policy: Policy, counts: Sum, demand: Demand) -> None:
        super().__init__()
        self.layer, self.policy, self.counts, self.demand = layer, policy, counts, demand

    @property
    def is_looking(self) -> bool:
        return self.training and (torch.compiler.is_compiling() or self.demand.is_open)

    def forward(self, routing: Routing) -> Tensor:
        self.counts.add(routing.counts.sum(0).float())
        return routing.weights


class Loads(StepRule):
    """Sums over tokens of all routers of a model: of a micro-batch, of the step, of all ranks. One a run (`loads_of`).

    All sums of a step are reduced together, fp64, in one collective after its last backward; where someone
    `needs_each_micro_batch`, in one after each forward instead. Where everybody asked for reported steps alone, the
    others have none and cost nothing.

    Args:
        ledger: Of the run.
        routers: Of the model, in its order.
        group: Ranks whose tokens differ; None is all.
    """

    name = "router_loads"
    micro_batch: Tensor | None = None
    """This rank's sums of the micro-batch whose forward has ended; all of these fp64, parts of them given by `part`."""
    all_ranks: Tensor | None = None
    """The same of all ranks, if someone `needs_each_micro_batch`."""
    so_far: Tensor | None = None
    """Of the step up to this micro-batch: of all ranks if someone `needs_each_micro_batch`, else of this rank."""
    whole: Tensor | None = None
    """Of the whole step of all ranks, before its first backward, if someone `needs_whole_step`."""
    last_step: Tensor | None = None
    """Of all micro-batches of all ranks, of the last step: from `before_optimizer` of it to that of the next. None
    where nobody needed them of that step."""

    def __init__(
        self, ledger: Ledger, routers: Sequence[tuple[Place, Decision]], group: dist.ProcessGroup | None = None
    ) -> None:
        self.group, self.tokens = group, TokenShare(ledger, group)
        self._ledger, self._sums, self._spans = ledger, dict[str, Sum](), dict[str, slice]()
        self.demand = Demand()
        self._completions: list[Callable[[], None]] = []
        self._listeners: list[Callable[[], None]] = []
        self._reduces_each = self._looks_ahead = self._remembers = False
        self._remembered: Mapping[str, Any] = {}
        self.layers: list[RouterLoads] = []
        """What counts each router's choices, in the order of the model."""
        for index, (place, decision) in enumerate(routers):
            self.count(index if place.layer is None else place.layer, place.name, decision)
        ledger.before_forward(self._begin_forward)
        ledger.after_forward(self._end_forward)

    # What techniques ask for, at installation.

    def count(self, layer: int, name: str, decision: Decision) -> RouterLoads:
        """Count what another router chooses.

        Args:
            layer: Its number, for what is logged.
            name: Of it.
            decision: Around it.
        """
        counts = self.open(f"counts/{name}", decision.policy.num_experts)
        decision.tell(found := RouterLoads(layer, decision.policy, counts, self.demand))
        self.layers.append(found)
        return found

    def open(self, name: str, size: int) -> Sum:
        """Have `size` more numbers added up and reduced along with the counts.

        Args:
            name: For messages and states, e.g. `entropy/3`; no two have the same.
            size: N.
        """
        if name in self._sums:
            raise ValueError(f"there is a sum {name!r} already")
        first = max((span.stop for span in self._spans.values()), default=2)  # tokens and micro-batches come first
        self._sums[name] = made = Sum(name, size)
        self._spans[name] = slice(first, first + size)
        return made

    def needs_each_micro_batch(self) -> None:
        """Have sums reduced over ranks after each forward."""
        self._reduces_each = True

    def needs_whole_step(self) -> None:
        """Have each step begin with a forward of all its micro-batches, see `Ledger.look_ahead`."""
        if not self._looks_ahead:
            self._looks_ahead = True
            self._ledger.look_ahead(self._end_look)

    def needs_last_step(self) -> None:
        """Have `last_step` saved in checkpoints, for what depends on it in the next."""
        self._remembers = True

    def complete_by(self, function: Callable[[], None]) -> None:
        """Call `function` after each training forward that counts, before its sums are added up."""
        self._completions.append(function)

    def after_micro_batch(self, function: Callable[[], None]) -> None:
        """Call `function` after each training forward, before its backward, when sums of it are there."""
        self._listeners.append(function)

    # Reading.

    def part(self, sums: Tensor, of: Sum) -> Tensor:
        """Return the numbers [N] of one sum out of `micro_batch`, `all_ranks`, `so_far`, `whole` or `last_step`."""
        return sums[self._spans[of.name]]

    def num_tokens(self, sums: Tensor) -> Tensor:
        """Return how many tokens they are sums over, fp64 (1,)."""
        return sums[:1]

    def num_micro_batches(self, sums: Tensor) -> Tensor:
        """Return how many micro-batches they are sums over, counting those of each rank, fp64 (1,)."""
        return sums[1:2]

    # A step.

    def begin_step(self, context: StepContext) -> None:
        self.micro_batch = self.all_ranks = self.so_far = self.whole = None
        self.demand.is_open = self.demand.every_step or context.is_reported
        if self._remembered:
            self._recall()

    def _begin_forward(self, batch: Batch) -> None:
        if not self.demand.is_open:
            return
        torch._foreach_zero_([one.value for one in self._sums.values()])

    @torch.no_grad()
    def _end_forward(self) -> None:
        if not self.demand.is_open:
            return
        for function in self._completions:
            function()
        values = [one.value for one in self._sums.values()]
        found = torch.cat([self.tokens.count, torch.ones_like(self.tokens.count), *values]).double()
        each = self._reduces_each and not self._ledger.is_looking
        self.micro_batch = found
        self.all_ranks = reduced(found, "sum", self.group) if each else None
        added = found if self.all_ranks is None else self.all_ranks
        self.so_far = added if self.so_far is None else self.so_far + added
        if not self._ledger.is_looking:
            for function in self._listeners:
                function()

    def _end_look(self) -> None:
        assert self.so_far is not None
        self.whole, self.so_far = reduced(self.so_far, "sum", self.group), None

    def before_optimizer(self, context: StepContext) -> None:
        if self.so_far is None:
            self.last_step = None
        elif self.whole is not None:
            self.last_step = self.whole
        else:
            self.last_step = self.so_far if self._reduces_each else reduced(self.so_far, "sum", self.group)

    # States.

    def state_dict(self) -> dict[str, Any]:
        if not self._remembers or self.last_step is None:
            return {}
        parts = {name: self.part(self.last_step, one).tolist() for name, one in self._sums.items()}
        return {"sums_over": self.last_step[:2].tolist(), "sums": parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._remembered = state

    def _recall(self) -> None:
        """Take up what was saved, once there are devices; a sum that was not is zero."""
        saved, device = self._remembered["sums"], self.tokens.count.device
        parts = [saved.get(name, [0.0] * len(one.value)) for name, one in self._sums.items()]
        flat = [*self._remembered["sums_over"], *(number for part in parts for number in part)]
        self.last_step, self._remembered = torch.tensor(flat, dtype=torch.float64, device=device), {}


def loads_of(sites: Sites, context: InstallContext, *, only_reported: bool = False) -> Loads:
    """Return the loads of a run's routers, the same for all techniques that ask.

    Args:
        sites: Of the model.
        context: Of the run.
        only_reported: Whether whoever asks needs them in steps alone whose metrics are reported.

    Raises:
        ConfigError: The model has no routers, or ones whose output is not understood.
    """
    loads = context.shared(Loads, lambda: Loads(context.ledger, decisions(sites, context.ledger, decide=False)))
    loads.demand.every_step |= not only_reported
    return loads
