"""What looks at one router: how sure it is and how large its logits are in training, where tokens go in evaluation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leanmill.core.account import add_once, is_recompute
from leanmill.moe.loads.loads import RouterLoads, Sum
from leanmill.moe.routing.decision import Reader, Routing
from leanmill.moe.routing.policy import Score


NUM_SUMS = 4
"""Of `look`: entropies, mean squares of logits, choices that are dropped, tokens."""
_FLOOR = -1e4
"""Logits this far below a token's largest have no share, and closed experts, at -inf, are put there."""


class Shown:
    """Which positions of the batch under evaluation are tokens; one for all routers of a model."""

    mask: Tensor | None = None
    """bool [B x S]."""


def look(into: Tensor, logits: Tensor, is_kept: Tensor | None, mask: Tensor | None, score: Score) -> None:
    """Add sums over tokens to `into`, fp32 [NUM_SUMS], unless a forward is only being recomputed.

    Args:
        into: Gets the entropies of the shares of affinity in nats, the mean squares of logits (of an expert that is
            closed to the token counting 0), the number of choices that are dropped, and that of tokens: fewer than
            the batch's where a technique leaves some out.
        logits: [T, E], without gradients; -inf where an expert is closed.
        is_kept: bool [T, K]: False for choices that are dropped; None where none are.
        mask: bool [T] or None: which positions are tokens.
        score: How logits become scores, see `affinities`.
    """
    if torch.compiler.is_compiling():
        _look_op(into, logits, is_kept, mask, score == "sigmoid")
    else:
        # An operator of one's own takes longer to call than all of this.
        with torch.no_grad():
            _look(into, logits, is_kept, mask, score == "sigmoid")


def _look(into: Tensor, logits: Tensor, is_kept: Tensor | None, mask: Tensor | None, is_sigmoid: bool) -> None:
    if is_recompute():
        return
    wide = logits.float()
    if mask is not None:
        # Whatever padding holds, NaN too, reaches nobody.
        wide = torch.where(mask.unsqueeze(-1), wide, 0.0)
    logarithms = F.logsigmoid(wide) if is_sigmoid else wide
    # Not torch's softmax, which takes several times as long over few experts.
    below = (logarithms - logarithms.amax(-1, keepdim=True)).clamp_(min=_FLOOR)
    parts = below.exp()
    totals = parts.sum(-1)
    entropies = totals.log() - parts.mul_(below).sum(-1) / totals
    if mask is not None:
        entropies = entropies.masked_fill(~mask, 0)
    squares = wide.masked_fill(wide == -torch.inf, 0).square_().sum() / wide.shape[1]
    dropped = squares.new_zeros(()) if is_kept is None else (~is_kept).sum().to(squares.dtype)
    num_tokens = squares.new_full((), len(wide)) if mask is None else mask.sum().to(squares.dtype)
    into.add_(torch.stack([entropies.sum(), squares, dropped, num_tokens]))


@torch.library.custom_op("leanmill::look_at_router", mutates_args={"into"})
def _look_op(into: Tensor, logits: Tensor, is_kept: Tensor | None, mask: Tensor | None, is_sigmoid: bool) -> None:
    _look(into, logits, is_kept, mask, is_sigmoid)


@_look_op.register_fake
def _(into: Tensor, logits: Tensor, is_kept: Tensor | None, mask: Tensor | None, is_sigmoid: bool) -> None:
    return None


class RouterWatch(Reader):
    """Looks at one router, and lets its weights be.

    Args:
        loads: Of the router.
        sums: Of this module, reduced along with the loads.
        shown: Of the model.
    """

    technique = "moe_metrics"
    seen: Tensor
    """fp32 [E]: tokens of the evaluation under way sent to each expert, on this rank."""

    def __init__(self, loads: RouterLoads, sums: Sum, shown: Shown) -> None:
        super().__init__()
        self.sums, self.shown = sums, shown
        # Past nn.Module's registration: it looks at the router by itself.
        self.__dict__["_loads"] = loads
        self.score: Score = loads.policy.score
        self.register_buffer("seen", torch.zeros(loads.policy.num_experts), persistent=False)

    @property
    def router(self) -> RouterLoads:
        """What counts the router's choices."""
        return self.__dict__["_loads"]  # type: ignore[no-any-return]

    def forward(self, routing: Routing) -> Tensor:
        if self.training:
            look(self.sums.value, routing.logits.detach(), routing.is_kept, routing.token_mask, self.score)
        else:
            mask = self.shown.mask
            if mask is not None and len(mask) != len(routing.experts):
                mask = None  # a technique leaves tokens out, and which stand in is not known
            add_once(self.seen, _counts(routing.experts, len(self.seen), mask))
        return routing.weights


def _counts(experts: Tensor, num_experts: int, mask: Tensor | None) -> Tensor:
    """How often each expert occurs in `experts` [T, K] where `mask` [T] is true, fp32 [E]."""
    chosen = experts if mask is None else experts.masked_fill(~mask.unsqueeze(-1), num_experts)
    chosen = chosen.reshape(-1)
    ones = torch.ones_like(chosen, dtype=torch.float32)
    return ones.new_zeros(num_experts + 1).scatter_add(0, chosen, ones)[:-1]
