"""The losses around one router. Counting is `leanmill.moe.loads`'s."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from leanmill.core.account import Account, add_once
from leanmill.core.ledger import Ledger
from leanmill.kernels.topk_router import naive
from leanmill.moe.balancing.factors import Devices, of_experts
from leanmill.moe.loads.loads import RouterLoads, Sum
from leanmill.moe.loads.tokens import TokenShare
from leanmill.moe.routing.decision import Reader, Routing


Kind = Literal["router_balance", "router_device", "router_communication"]
"""A loss sum_i factor_i P_i, by the name it is logged as; `factors` has what the factors are."""


class Balanced(nn.Module):
    """One loss of one router whose factors are written between forward and backward."""

    factors: Tensor
    """fp32 [E]."""

    def __init__(self, account: Account, num_experts: int) -> None:
        super().__init__()
        self.account = account
        self.register_buffer("factors", torch.zeros(num_experts), persistent=False)


class Balance(Reader):
    """The balance losses and the z-loss of one router, attached to its combine weights.

    A balance loss is sum_i factor_i P_i: P_i, the mean share of affinity to expert i, carries the gradient, and
    factor_i, which depends on where tokens were sent, is a constant. Over rows both are known in forward;
    else P is the micro-batch's own and the factors are written before its backward (`BalanceRule`).

    Args:
        ledger: Of the run.
        loads: What counts this router's choices.
        tokens: Of the run.
        weights: Of each balance loss of this layer in the objective.
        z_weight: Of this layer's z-loss.
        over_rows: Whether the balance loss is a mean over rows, each by itself.
        devices: For the losses of devices, if there are some.
        sent: Where to count what is sent to devices, if that is needed.
        prefix: Of the names that its losses are logged as.
    """

    technique = "router_balance"
    shares: Tensor
    """fp32 [E]: P of this micro-batch."""

    def __init__(
        self,
        ledger: Ledger,
        loads: RouterLoads,
        tokens: TokenShare,
        *,
        weights: dict[Kind, float],
        z_weight: float,
        over_rows: bool,
        devices: Devices | None,
        sent: Sum | None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.policy, self.tokens, self.over_rows, self.devices = loads.policy, tokens, over_rows, devices
        self.losses = nn.ModuleDict(
            {
                kind: Balanced(
                    ledger.open(f"{prefix}{kind}/{loads.layer}", per="micro_batch", weight=weight),
                    self.policy.num_experts,
                )
                for kind, weight in weights.items()
            }
        )
        self.z = ledger.open(f"{prefix}router_z/{loads.layer}", per="micro_batch", weight=z_weight)
        self.sent = sent
        self.register_buffer("shares", torch.zeros(self.policy.num_experts), persistent=False)

    @property
    def is_looking(self) -> bool:
        return self.training

    def forward(self, routing: Routing) -> Tensor:
        weights = self._balance_rows(routing) if self.over_rows else self._balance(routing)
        z = routing.z_loss
        return self.z.attach(weights, z if routing.token_mask is None else z * self.tokens.share)

    def _balance(self, routing: Routing) -> Tensor:
        weights, mask = routing.weights, routing.token_mask
        shares = _over_tokens(routing.mean_probability, mask)
        add_once(self.shares, shares.detach())
        if self.sent is not None and self.devices is not None:
            reached = self.devices.reached(routing.experts, self.policy.num_experts)
            self.sent.add((reached if mask is None else reached & mask.unsqueeze(-1)).sum(0).float())
        for loss in self.losses.values():
            weights = loss.account.inject(weights, shares, loss.factors)  # type: ignore[operator, union-attr]
        return weights

    def _balance_rows(self, routing: Routing) -> Tensor:
        """Attach the loss of rows, each by itself (arXiv:2412.19437, eq. 17 to 20)."""
        factors = of_experts(self._counts_by_affinity(routing))
        (loss,) = self.losses.values()
        mean = (factors * routing.mean_probability).sum(-1).mean()
        attached: Tensor = loss.account.attach(routing.weights, mean)  # type: ignore[operator, union-attr]
        return attached

    def _counts_by_affinity(self, routing: Routing) -> Tensor:
        """Return how often affinity alone would choose each expert, fp32 [S, E]: as the equations have it."""
        if self.policy.bias is None and self.policy.groups is None:
            return routing.counts.float()
        num_rows, num_experts = routing.counts.shape
        chosen = routing.logits.detach().topk(self.policy.top_k).indices
        if routing.token_mask is not None:
            chosen = chosen.masked_fill(~routing.token_mask.unsqueeze(-1), num_experts)
        return naive.counts(chosen, num_experts, num_rows).float()


def _over_tokens(means: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over all tokens, of means over the tokens of each row [S, E]; of padding alone it is 0."""
    if mask is None:
        return means.mean(0)
    counts = mask.view(len(means), -1).sum(1).to(means.dtype)
    return (means * counts.unsqueeze(1)).sum(0) / counts.sum().clamp(min=1)
