"""Moving the biases that routers add to scores for the choice of experts, and only for that."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from leanmill.core.errors import ConfigError
from leanmill.core.rules import StepContext, StepRule
from leanmill.core.sites import Sites
from leanmill.core.technique import InstallContext
from leanmill.moe.loads.loads import Loads, RouterLoads, loads_of
from leanmill.moe.routing.install import decisions


def bias_step(counts: Tensor, rate: float) -> Tensor:
    """Return what is added to the biases of a layer's experts: rate x sign(mean count - count), less its mean.

    The mean changes no choice; taken off, biases do not drift (the paper leaves it).

    Args:
        counts: Copies sent to each expert in the step, by all ranks [E].
        rate: u of arXiv:2408.15664, algorithm 1.
    """
    step = rate * (counts.mean() - counts).sign()
    return step - step.mean()


class BiasRule(StepRule):
    """Moves every router's bias after each optimizer step that was not skipped, by the loads of the whole step.

    Ranks add the same to the same, so biases stay equal bitwise. They are buffers of the plain model: checkpoints
    and exports hold them.

    Args:
        loads: Of the run.
        routers: Each router, what counts its choices, its path, and the name of its bias.
        rate: See `bias_step`.
        until: Share of all steps after which biases rest.
    """

    name = "bias_balance"

    def __init__(
        self, loads: Loads, routers: list[tuple[nn.Module, RouterLoads, str, str]], *, rate: float, until: float
    ) -> None:
        self._loads, self._routers, self._rate, self._until = loads, routers, rate, until

    def check(self) -> None:
        for router, _, name, _ in self._routers:
            if not any(parameter.requires_grad for parameter in router.parameters()):
                raise ConfigError(
                    f"bias_balance moves the bias of {name}, whose weight another technique freezes, so that a "
                    f"checkpoint of what trains would lose it; remove the technique that freezes, such as lora"
                )

    @torch.no_grad()
    def after_optimizer(self, context: StepContext) -> None:
        """Move biases, by zero where the step was skipped: nobody waits for the device to say so."""
        sums = self._loads.last_step
        if sums is None or context.skipped is None or context.step >= self._until * context.num_steps:
            return
        taken = ~context.skipped
        for router, layer, _, bias in self._routers:
            step = bias_step(self._loads.part(sums, layer.counts), self._rate)
            # Asked for anew: engines replace buffers when they move them.
            router._buffers[bias].add_(torch.where(taken, step, 0.0).to(router._buffers[bias].dtype))  # type: ignore[union-attr]

    def metrics(self) -> Mapping[str, float]:
        """Return the largest distance between two biases of one layer."""
        biases = [router._buffers[bias] for router, _, _, bias in self._routers]
        return {"largest_spread": max(float(b.max() - b.min()) for b in biases if b is not None)}


def move_biases(sites: Sites, context: InstallContext, *, rate: float, until: float) -> None:
    """Have the bias of every router of the model moved, by a rule of the run.

    Raises:
        ConfigError: The model has no routers, or ones without a bias that an export would carry.
    """
    loads, routers = loads_of(sites, context), []
    if any(isinstance(rule, BiasRule) for rule in context.shared_rules()):
        raise ConfigError("bias_balance is listed twice; keep one entry")
    for (place, decision), layer in zip(decisions(sites, context.ledger), loads.layers, strict=True):
        bias = decision.policy.bias
        if bias is None:
            raise ConfigError(
                f"bias_balance: {place.name} has no bias among its buffers that changes only the choice of experts, "
                f"which an export would carry; choose a family that has, e.g. model.config.model_type: deepseek_v3, or "
                f"a loss: router_balance"
            )
        routers.append((place.module, layer, place.name, bias))
    context.shared(BiasRule, lambda: BiasRule(loads, routers, rate=rate, until=until))
