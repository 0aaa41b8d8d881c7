"""The losses of every router, and the counting they need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from leanmill.core.around import Around, Call, Ring, arounds
from leanmill.core.errors import ConfigError
from leanmill.core.ledger import Account, Ledger, add_once, write_late
from leanmill.core.rules import StepContext, StepRule
from leanmill.core.sites import Sites
from leanmill.moe.routing.policy import Policy, affinities, policy_of
from leanmill.parallel.collectives import sum_over_ranks


class Balance(Around):
    """Both losses of one router, attached to the combine weights it returns.

    The load-balance loss is E x sum_i f_i P_i: P_i, the mean share of affinity to expert i, is that of the
    micro-batch and carries the gradient; f_i, the share of places at expert i, is a constant that is
    written between forward and backward.

    Args:
        ledger: Of the run.
        layer: What the losses are logged by.
        policy: Of the router.
        weight: Of this layer's load-balance loss in the objective.
        z_weight: Of this layer's z-loss.
    """

    technique = "router_balance"
    ring = Ring.SCALE
    counts: Tensor
    """fp32 [E]: tokens of this micro-batch sent to each expert."""
    shares: Tensor
    """fp32 [E]: P of this micro-batch."""
    coefficients: Tensor
    """fp32 [E]: E x f."""

    def __init__(self, ledger: Ledger, layer: int, *, policy: Policy, weight: float, z_weight: float) -> None:
        super().__init__()
        self.score = policy.score
        self.balance: Account = ledger.open(f"router_balance/{layer}", per="micro_batch", weight=weight)
        self.z = ledger.open(f"router_z/{layer}", per="micro_batch", weight=z_weight)
        for name in ("counts", "shares", "coefficients"):
            self.register_buffer(name, torch.zeros(policy.num_experts), persistent=False)

    def forward(self, call: Call, /, *args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        if not self.training:
            return output
        logits, weights, experts, *rest = output
        shares = affinities(logits, self.score).mean(0)
        each = torch.arange(logits.shape[-1], device=experts.device)
        add_once(self.counts, (experts.unsqueeze(-1) == each).sum((0, 1)).float())
        add_once(self.shares, shares.detach())
        weights = self.balance.inject(weights, shares, self.coefficients)
        weights = self.z.attach(weights, logits.float().logsumexp(-1).square().mean())
        return (logits, weights, experts, *rest)


class BalanceRule(StepRule):
    """Turns counts into the coefficients of a micro-batch, for all layers at once, and reports loads.

    Args:
        balances: Of all layers.
        is_global: Whether loads are those of all ranks and all micro-batches of the step so far, at one
            reduction a micro-batch, or of the rank's micro-batch alone.
    """

    name = "router_balance"

    def __init__(self, balances: list[Balance], *, is_global: bool) -> None:
        self._balances, self._is_global = balances, is_global
        self._sizes = [balance.counts.numel() for balance in balances]
        self._step_counts: Tensor | None = None
        """fp32, [E] of every layer in a row: of the step so far; of all ranks where loads are."""

    def begin_step(self, context: StepContext) -> None:
        self._step_counts = None

    def before_optimizer(self, context: StepContext) -> None:
        if self._step_counts is not None and not self._is_global:
            self._step_counts = sum_over_ranks(self._step_counts)

    @torch.no_grad()
    def end_forward(self) -> None:
        """Write the coefficients of the micro-batch whose forward has ended; where loads are global, a collective."""
        counts = torch.cat([balance.counts for balance in self._balances])
        if self._is_global:
            counts = sum_over_ranks(counts)
        self._step_counts = counts if self._step_counts is None else self._step_counts + counts
        loads = (self._step_counts if self._is_global else counts).split(self._sizes)
        for balance, load in zip(self._balances, loads, strict=True):
            coefficients = load * (len(load) / load.sum())
            write_late(balance.coefficients, coefficients)
            balance.balance.note((coefficients * balance.shares).sum().reshape(1))
        torch._foreach_zero_([b for balance in self._balances for b in (balance.counts, balance.shares)])

    def metrics(self) -> Mapping[str, float]:
        """Return the largest load of the last step's tokens over the mean load: each layer's, and their mean."""
        if self._step_counts is None:
            return {}
        loads = self._step_counts.split(self._sizes)
        ratios = torch.stack([load.max() / load.mean() for load in loads]).tolist()
        layers = [balance.balance.name.rpartition("/")[-1] for balance in self._balances]
        return {"max_load": sum(ratios) / len(ratios)} | {
            f"max_load/{layer}": ratio for layer, ratio in zip(layers, ratios, strict=True)
        }


def balance_routers(sites: Sites, ledger: Ledger, *, weight: float, z_weight: float, is_global: bool) -> BalanceRule:
    """Stand around every router of the model; both losses are means over layers.

    Raises:
        ConfigError: The model has no routers, ones whose output is not understood, or another entry has them.
    """
    places = sites.modules("router")
    hidden_size: int = sites.model.config.get_text_config().hidden_size  # type: ignore[union-attr, operator, assignment]
    balances = []
    for index, place in enumerate(places):
        if any(around.technique == Balance.technique for around in arounds(place.module)):
            raise ConfigError("router_balance is listed twice; keep one entry, whose `weight` is the sum of both")
        balance = Balance(
            ledger,
            index if place.layer is None else place.layer,
            policy=policy_of(place.module, place.name, hidden_size),
            weight=weight / len(places),
            z_weight=z_weight / len(places),
        )
        place.around(balance)
        balances.append(balance)
    rule = BalanceRule(balances, is_global=is_global)
    ledger.after_forward(rule.end_forward)
    return rule
