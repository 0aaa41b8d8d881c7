"""Experts under way between ranks: the sparse all-gather of their weights and the sparse reduce-scatter of gradients.

A collective over all ranks moves whole tensors; here each rank fetches the experts that it wants from their
owners, and nothing else moves. Gradients go back the same way and are added up by the owner in a fixed
order of ranks, in the dtype of its weights, so results repeat bitwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from leanmill.core.account import is_recompute
from leanmill.parallel.fssdp_placement import Owners


Parcels = list[tuple[int, Tensor]]
"""Tensors with the rank that each goes to or comes from; those of a pair of ranks in the same order on both."""


def exchange(send: Parcels, receive: Parcels, group: dist.ProcessGroup) -> None:
    """Send tensors to ranks of `group` and fill those of `receive`, all contiguous; return when both are done."""
    if not send and not receive:
        return
    ops = [dist.P2POp(dist.isend, tensor, group=group, group_peer=rank) for rank, tensor in send]
    ops += [dist.P2POp(dist.irecv, tensor, group=group, group_peer=rank) for rank, tensor in receive]
    for work in dist.batch_isend_irecv(ops):
        work.wait()


@dataclass(frozen=True)
class Copies:
    """What of a layer's experts this rank holds in a micro-batch, and who holds copies of its own."""

    owned: list[int]
    """Experts that this rank owns, ascending: the first of those it holds."""
    fetched: list[int]
    """Experts of others that it holds a copy of, ascending: the rest."""
    owners: Owners
    wanted_by: list[list[int]]
    """By rank: experts of this one that the rank holds a copy of, ascending; none of its own."""
    group: dist.ProcessGroup

    @classmethod
    def of(cls, wanted: Tensor, owners: Owners, group: dist.ProcessGroup) -> Copies:
        """Return this rank's part of a plan.

        Args:
            wanted: Bool [ranks, experts] on the host: experts that a rank does not own and holds a copy of.
            owners: Of all experts.
            group: The ranks.
        """
        me = group.rank()
        owned = [expert for expert, owner in enumerate(owners) if owner == me]
        wanted_by: list[list[int]] = [[] for _ in range(group.size())]
        for rank, place in wanted[:, owned].nonzero().tolist():
            wanted_by[rank].append(owned[place])
        return cls(owned, wanted[me].nonzero().flatten().tolist(), owners, wanted_by, group)

    @property
    def num_held(self) -> int:
        """Experts here; at least one, which is zero where there is none, since products of no expert do not exist."""
        return max(1, len(self.owned) + len(self.fetched))

    def places(self, device: torch.device) -> Tensor:
        """Return where each expert stands among those that its owner, or this rank, holds: int64 [E]."""
        seen: dict[int, int] = {}
        places = [0] * len(self.owners)
        for expert, owner in enumerate(self.owners):
            places[expert] = seen.get(owner, 0)
            seen[owner] = places[expert] + 1
        for place, expert in enumerate(self.fetched, start=len(self.owned)):
            places[expert] = place
        return torch.tensor(places, device=device)

    def fill(self, held: Sequence[Tensor], own: Sequence[Tensor]) -> None:
        """Write the experts here into `held` [num_held, ...], one tensor a weight, from owners' `own` [owned, ...]."""
        place = {expert: index for index, expert in enumerate([*self.owned, *self.fetched])}
        send: Parcels = []
        receive: Parcels = []
        for into, mine in zip(held, own, strict=True):
            if not place:
                into.zero_()
            into[: len(self.owned)].copy_(mine)
            send += [(rank, into[place[e]]) for rank, experts in enumerate(self.wanted_by) for e in experts]
            receive += [(self.owners[e], into[place[e]]) for e in self.fetched]
        exchange(send, receive, self.group)

    def collect(self, gradients: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        """Return the summed gradients of this rank's own experts, from those of all copies.

        One round for each distance between ranks, so an owner holds the gradients of one other rank at a time.

        Args:
            gradients: Of what is held here [num_held, ...], one tensor a weight.
            like: The owner's weights, for the dtype.
        """
        place = {expert: index for index, expert in enumerate([*self.owned, *self.fetched])}
        pairs = list(zip(gradients, like, strict=True))
        totals = [gradient[: len(self.owned)].to(own.dtype, copy=True) for gradient, own in pairs]
        size, me = self.group.size(), self.group.rank()
        for distance in range(1, size):
            to, source = (me + distance) % size, (me - distance) % size
            returned = [e for e in self.fetched if self.owners[e] == to]
            incoming = [[torch.empty_like(g[0]) for _ in self.wanted_by[source]] for g in gradients]
            exchange(
                [(to, g[place[e]].contiguous()) for g in gradients for e in returned],
                [(source, part) for parts in incoming for part in parts],
                self.group,
            )
            for total, parts in zip(totals, incoming, strict=True):
                for expert, part in zip(self.wanted_by[source], parts, strict=True):
                    total[place[expert]] += part
        return [total.div_(size) for total in totals]


class Held:
    """The weights of the experts here for one micro-batch, differentiable in the owners' weights.

    Args:
        copies: Which.
        own: This rank's own, [owned, ...], one tensor a weight.
        dtype: That they are multiplied in, and travel in.
        rematerialise: Free them after forward and fetch them again in backward. Where a block is recomputed,
            its recomputation fetches them, and they stay until their backward.
    """

    def __init__(self, copies: Copies, own: Sequence[Tensor], dtype: torch.dtype, *, rematerialise: bool) -> None:
        trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in own)
        self._node = _Node()
        self._frees = rematerialise and trains and not is_recompute()
        self.weights: tuple[Tensor, ...] = _Fetch.apply(self._node, copies, dtype, *own)
        """[num_held, ...], one a weight; empty once `done`, until backward."""

    def done(self, out: Tensor) -> Tensor:
        """Return `out`, computed from the weights, and let go of them; its backward begins with fetching them."""
        weights, self.weights = self.weights, ()
        if not self._frees:
            return out
        for weight in weights:
            weight.untyped_storage().resize_(0)
        return _Refetch.apply(out, self._node)  # type: ignore[no-any-return]


class _Node:
    """What `_Refetch` must know of `_Fetch`: its context, whose saved weights are those of the recomputation if any."""

    context: Any = None


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, node: _Node, copies: Copies, dtype: torch.dtype, *own: Tensor) -> tuple[Tensor, ...]:
        held = tuple(tensor.new_empty((copies.num_held, *tensor.shape[1:]), dtype=dtype) for tensor in own)
        copies.fill(held, own)
        ctx.save_for_backward(*held)
        ctx.travelling, ctx.own = copies, own
        node.context = ctx
        return held

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        own, ctx.own = ctx.own, ()
        return None, None, None, *ctx.travelling.collect(gradients, own)


class _Refetch(torch.autograd.Function):
    """Identity; its backward, which runs before that of the products, gives the freed weights their values again."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, node: _Node) -> Tensor:
        ctx.node = node
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        fetch, ctx.node = ctx.node.context, None
        # Asked for by name of the node that saved them: where the block was recomputed, those of the recomputation.
        held = [weight.data for weight in fetch.saved_tensors]  # past the version that backward checks
        if any(weight.untyped_storage().size() == 0 and weight.numel() for weight in held):
            for weight in held:
                weight.untyped_storage().resize_(weight.numel() * weight.element_size())
            fetch.travelling.fill(held, fetch.own)
        return grad, None
