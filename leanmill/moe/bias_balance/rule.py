"""Moving the biases that routers add to scores for the choice of experts, and only for that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leanmill.core.errors import ConfigError
from leanmill.core.places import Place
from leanmill.core.rules import StepContext, StepRule
from leanmill.core.sites import Sites
from leanmill.core.technique import InstallContext
from leanmill.moe.loads.loads import Loads, RouterLoads, loads_of
from leanmill.moe.routing.install import decisions
from leanmill.moe.routing.policy import ARGUMENT, Policy


def bias_step(counts: Tensor, rate: float) -> Tensor:
    """Return what is added to the biases of a layer's experts: rate x sign(mean count - count), less its mean.

    The mean changes no choice; taken off, biases do not drift (the paper leaves it).

    Args:
        counts: Copies sent to each expert in the step, by all ranks [E].
        rate: u of arXiv:2408.15664, algorithm 1.
    """
    step = rate * (counts.mean() - counts).sign()
    return step - step.mean()


@dataclass(frozen=True, kw_only=True)
class BiasedRouter:
    """One router and its bias."""

    router: nn.Module
    path: str
    counts: RouterLoads
    owner: nn.Module
    """Whose buffer the bias is."""
    name: str
    """Of the buffer."""

    @property
    def bias(self) -> Tensor:
        """The bias, asked for anew each time: engines replace buffers when they move them."""
        found = self.owner._buffers[self.name]
        assert found is not None
        return found


class BiasRule(StepRule):
    """Moves every router's bias after each optimizer step that was not skipped, by the loads of the whole step.

    Ranks add the same to the same, so biases stay equal bitwise. They are buffers of the plain model: checkpoints
    and exports hold them.

    Args:
        loads: Of the run.
        routers: Of the model.
        rate: See `bias_step`.
        until: Share of all steps after which biases rest.
    """

    name = "bias_balance"

    def __init__(self, loads: Loads, routers: list[BiasedRouter], *, rate: float, until: float) -> None:
        self._loads, self._routers, self._rate, self._until = loads, routers, rate, until

    def check(self) -> None:
        for one in self._routers:
            if not any(parameter.requires_grad for parameter in one.router.parameters()):
                raise ConfigError(
                    f"bias_balance moves the bias of {one.path}, whose weight another technique freezes, so that a "
                    f"checkpoint of what trains would lose it; remove the technique that freezes, such as lora"
                )

    @torch.no_grad()
    def after_optimizer(self, context: StepContext) -> None:
        """Move biases, by zero where the step was skipped: nobody waits for the device to say so."""
        sums = self._loads.last_step
        if sums is None or context.skipped is None or context.step >= self._until * context.num_steps:
            return
        taken = ~context.skipped
        for one in self._routers:
            step = bias_step(self._loads.part(sums, one.counts.counts), self._rate)
            one.bias.view(-1).add_(torch.where(taken, step, 0.0).to(one.bias.dtype))

    def metrics(self) -> Mapping[str, float]:
        """Return the largest distance between two biases of one layer."""
        return {"largest_spread": max(float(one.bias.max() - one.bias.min()) for one in self._routers)}


def move_biases(sites: Sites, context: InstallContext, *, rate: float, until: float) -> None:
    """Have the bias of every router of the model moved, by a rule of the run.

    Raises:
        ConfigError: The model has no routers, or ones without a bias that an export would carry.
    """
    loads, routers = loads_of(sites, context), []
    if any(isinstance(rule, BiasRule) for rule in context.shared_rules()):
        raise ConfigError("bias_balance is listed twice; keep one entry")
    for (place, decision), layer in zip(decisions(sites, context.ledger), loads.layers, strict=True):
        found = _held(sites.model, place, decision.policy)
        if found is None:
            raise ConfigError(
                f"bias_balance: {place.name} has no bias that changes only the choice of experts, which an export "
                f"would carry; choose a family that has, e.g. model.config.model_type: deepseek_v3, or a loss: "
                f"router_balance"
            )
        owner, name = found
        routers.append(BiasedRouter(router=place.module, path=place.name, counts=layer, owner=owner, name=name))
    context.shared(BiasRule, lambda: BiasRule(loads, routers, rate=rate, until=until))


def _held(model: nn.Module, place: Place, policy: Policy) -> tuple[nn.Module, str] | None:
    """Return the module that holds a router's bias, and the name of the buffer; None where it has none."""
    if policy.bias is None:
        return None
    if policy.bias != ARGUMENT:
        above, _, name = policy.bias.rpartition(".")
        return place.module.get_submodule(above), name
    around = model.get_submodule(place.name.rpartition(".")[0])
    names = [
        name
        for name, buffer in around._buffers.items()
        if buffer is not None and buffer.is_floating_point() and buffer.shape == (policy.num_experts,)
    ]
    return (around, names[0]) if len(names) == 1 else None
