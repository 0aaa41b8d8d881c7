"""Moving the biases that routers add to scores for the choice of experts, and only for that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leanmill.core.errors import ConfigError
from leanmill.core.rules import StepContext, StepRule
from leanmill.moe.loads.loads import Loads, RouterLoads


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
                    f"{self.name} moves the bias of {one.path}, whose weight another technique freezes, so that a "
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
