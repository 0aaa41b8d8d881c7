"""Factors of balance losses from loads, for all layers at once, by scope and estimator."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from leanmill.core.account import write_late
from leanmill.core.batches import Batch
from leanmill.core.ledger import Ledger
from leanmill.core.rules import StepRule
from leanmill.moe.balancing.factors import Devices, of_experts
from leanmill.moe.balancing.losses import Balance
from leanmill.moe.loads.loads import Loads, RouterLoads


Scope = Literal["sequence", "micro_batch", "data_parallel", "global_batch"]
Estimator = Literal["running", "warm_start", "two_pass"]


class BalanceRule(StepRule):
    """Writes the factors of a micro-batch whose forward has ended.

    Args:
        ledger: Of the run.
        loads: Of the run.
        balances: Around every router, each with what counts its choices.
        scope: Whose tokens are counted.
        estimator: How the counts of a global batch are had before its last micro-batch.
        devices: For the losses of devices, if there are some.
    """

    name = "router_balance"

    def __init__(
        self,
        ledger: Ledger,
        loads: Loads,
        balances: list[tuple[Balance, RouterLoads]],
        *,
        scope: Scope,
        estimator: Estimator,
        devices: Devices | None,
    ) -> None:
        self._loads, self._balances, self._devices = loads, balances, devices
        self._scope, self._estimator = scope, estimator
        if scope == "data_parallel" or (scope == "global_batch" and estimator != "two_pass"):
            loads.needs_each_micro_batch()
        if scope == "global_batch" and estimator == "two_pass":
            loads.needs_whole_step()
        if scope == "global_batch" and estimator == "warm_start":
            loads.needs_last_step()
        if scope != "sequence":
            ledger.before_forward(self.begin_forward)
            loads.after_micro_batch(self.end_forward)

    @torch.no_grad()
    def begin_forward(self, batch: Batch) -> None:
        """Forget the mean affinities of the last forward."""
        torch._foreach_zero_([balance.shares for balance, _ in self._balances])

    @torch.no_grad()
    def end_forward(self) -> None:
        """Write the factors of the micro-batch whose forward has ended."""
        sums, share = self._sums(), self._share()
        num_tokens = self._loads.num_tokens(sums)
        for balance, layer in self._balances:
            counts = self._loads.part(sums, layer.counts)
            sent = None if balance.sent is None else self._loads.part(sums, balance.sent)
            for kind, loss in balance.losses.items():
                factors = share * self._factors(kind, counts, sent, num_tokens)
                write_late(loss.factors, factors)  # type: ignore[union-attr, arg-type]
                loss.account.note((loss.factors * balance.shares).sum().reshape(1))  # type: ignore[operator, union-attr]

    def _factors(self, kind: str, counts: Tensor, sent: Tensor | None, num_tokens: Tensor) -> Tensor:
        if kind == "router_balance":
            return of_experts(counts)
        assert self._devices is not None
        if kind == "router_device":
            return self._devices.of_devices(counts)
        assert sent is not None
        return self._devices.of_communication(sent, num_tokens, len(counts))

    def _sums(self) -> Tensor:
        """The sums over those tokens whose loads the scope asks for, as far as they are known."""
        loads = self._loads
        found = {
            "micro_batch": loads.micro_batch,
            "data_parallel": loads.all_ranks,
            "global_batch": loads.whole if self._estimator == "two_pass" else loads.so_far,
        }[self._scope]
        assert found is not None
        if self._scope == "global_batch" and self._estimator == "warm_start" and loads.last_step is not None:
            # The micro-batches to come are taken to be like those of the last step.
            in_step, so_far = loads.num_micro_batches(loads.last_step), loads.num_micro_batches(found)
            found = found + loads.last_step * (1 - so_far / in_step).clamp(min=0)
        return found

    def _share(self) -> Tensor:
        """What makes a mean of means over the tokens of a micro-batch one over all their tokens; 1 without padding."""
        loads = self._loads
        if self._scope == "micro_batch":
            return torch.ones_like(loads.tokens.share)
        if self._scope == "global_batch":
            return loads.tokens.share
        assert loads.micro_batch is not None
        assert loads.all_ranks is not None
        mean = loads.num_tokens(loads.all_ranks) / loads.num_micro_batches(loads.all_ranks)
        return loads.num_tokens(loads.micro_batch) / mean.clamp(min=1)
