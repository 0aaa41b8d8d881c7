"""What looks at one router: how sure it is and how large its logits are in training, where tokens go in evaluation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leanmill.core.account import add_once, is_recompute
from leanmill.core.batches import Batch
from leanmill.kernels.topk_router import naive
from leanmill.moe.loads.loads import RouterLoads, Sum
from leanmill.moe.routing.decision import Reader, Routing


NUM_SUMS = 4
"""Numbers of a router, see `look`."""
_FLOOR = -1e4
"""Logits this far below a token's largest have no share, and closed experts, at -inf, are put there."""
_MOST_HELD = 2**20
"""Logits that are kept at once: 4 MB in fp32. Of more, operations take longer to run than to call."""


class Shown:
    """Which positions of the batch under evaluation are tokens; one for all routers of a model."""

    mask: Tensor | None = None
    """bool [B x S]."""


def look(logits: Tensor, is_kept: Tensor | None, mask: Tensor | None, *, is_sigmoid: bool) -> Tensor:
    """Return sums over the tokens of routers, fp32 [..., NUM_SUMS].

    They are the entropies of the shares of affinity in nats, the mean squares of logits (of an expert that is closed to
    the token counting 0), the number of choices that are dropped, and that of tokens: fewer than the batch's where a
    technique leaves some out.

    Args:
        logits: [..., T, E], without gradients; -inf where an expert is closed.
        is_kept: bool [..., T, K]: False for choices that are dropped; None where none are.
        mask: bool [T] or None: which positions are tokens.
        is_sigmoid: How logits become scores, see `affinities`.
    """
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
    squares = wide.masked_fill(wide == -torch.inf, 0).square_().sum((-2, -1)) / wide.shape[-1]
    dropped = torch.zeros_like(squares) if is_kept is None else (~is_kept).sum((-2, -1)).to(squares.dtype)
    num_tokens = torch.full_like(squares, wide.shape[-2]) if mask is None else mask.sum().to(squares).expand_as(squares)
    return torch.stack([entropies.sum(-1), squares, dropped, num_tokens], dim=-1)


@torch.library.custom_op("leanmill::look_at_router", mutates_args={"into"})
def _look_op(
    into: Tensor, logits: Tensor, is_kept: Tensor | None, mask: Tensor | None, is_sigmoid: bool, is_due: Tensor
) -> None:
    """Kept whole by compiled code, which asks neither for recomputation nor for the step."""
    if bool(is_due) and not is_recompute():
        into.add_(look(logits, is_kept, mask, is_sigmoid=is_sigmoid))


@_look_op.register_fake
def _(
    into: Tensor, logits: Tensor, is_kept: Tensor | None, mask: Tensor | None, is_sigmoid: bool, is_due: Tensor
) -> None:
    return None


class Held(NamedTuple):
    """One router of the forward under way; see `look`."""

    into: Tensor
    logits: Tensor
    is_kept: Tensor | None
    mask: Tensor | None
    is_sigmoid: bool


class Looks:
    """The routers of a forward, kept until it ends and looked at together. One of a model.

    On few tokens an operation takes as long to call as to run.
    """

    def __init__(self) -> None:
        self.is_due = True
        """Whether in this step."""
        self.flag = torch.ones((), dtype=torch.bool)
        """The same, for compiled code to ask; on the CPU."""
        self._held: list[Held] = []
        self._num_held = 0

    def begin_step(self, *, is_due: bool) -> None:
        """Look, or not, until this is called again."""
        self.is_due = is_due
        self.flag.fill_(is_due)

    def begin_forward(self, batch: Batch) -> None:
        """Forget what a forward that failed has left."""
        self._held, self._num_held = [], 0

    def hold(self, seen: Held) -> None:
        """Keep what a router saw, and look once much is kept."""
        self._held.append(seen)
        self._num_held += seen.logits.numel()
        if self._num_held > _MOST_HELD:
            self.look()

    @torch.no_grad()
    def look(self) -> None:
        """Add the sums of all that is kept to where each belongs."""
        held, self._held, self._num_held = self._held, [], 0
        alike: dict[Any, list[Held]] = {}
        for one in held:
            alike.setdefault((one.logits.shape, one.is_sigmoid, one.is_kept is None), []).append(one)
        for group in alike.values():
            first = group[0]
            is_kept = None if first.is_kept is None else torch.stack([one.is_kept for one in group])  # type: ignore[misc]
            sums = look(torch.stack([one.logits for one in group]), is_kept, first.mask, is_sigmoid=first.is_sigmoid)
            torch._foreach_add_([one.into for one in group], list(sums.unbind()))


class RouterWatch(Reader):
    """Looks at one router, and lets its weights be.

    Args:
        loads: Of the router.
        sums: Of this module, reduced along with the loads.
        looks: Of the model.
        shown: Of the model.
    """

    technique = "moe_metrics"
    seen: Tensor
    """fp32 [E]: tokens of the evaluation under way sent to each expert, on this rank."""

    def __init__(self, loads: RouterLoads, sums: Sum, looks: Looks, shown: Shown) -> None:
        super().__init__()
        self.sums, self.looks, self.shown = sums, looks, shown
        # Past nn.Module's registration: it looks at the router by itself.
        self.__dict__["_loads"] = loads
        self.is_sigmoid = loads.policy.score == "sigmoid"
        self.register_buffer("seen", torch.zeros(loads.policy.num_experts), persistent=False)

    @property
    def router(self) -> RouterLoads:
        """What counts the router's choices."""
        return self.__dict__["_loads"]  # type: ignore[no-any-return]

    @property
    def is_looking(self) -> bool:
        return not self.training or torch.compiler.is_compiling() or self.looks.is_due

    def forward(self, routing: Routing) -> Tensor:
        if self.training:
            seen = Held(self.sums.value, routing.logits.detach(), routing.is_kept, routing.token_mask, self.is_sigmoid)
            if torch.compiler.is_compiling():
                _look_op(*seen, self.looks.flag)
            elif not is_recompute():
                self.looks.hold(seen)
        else:
            mask = self.shown.mask
            if mask is not None and len(mask) != len(routing.experts):
                mask = None  # a technique leaves tokens out, and which stand in is not known
            experts = routing.experts
            if mask is not None:
                experts = experts.masked_fill(~mask.unsqueeze(-1), len(self.seen))
            add_once(self.seen, naive.counts(experts, len(self.seen), 1)[0].float())
        return routing.weights
