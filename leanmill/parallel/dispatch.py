"""Expert parallelism's dispatch: tokens travel to the ranks of their experts and results come back.

A token goes once to each *rank* that holds any of its experts, with its combine weights and the experts'
numbers there; that rank sums what its experts make of it, and one row comes back. So rows travel once a
(token, rank), never more and at fine granularity far less than once a (token, expert), and sums stay exact:
a token's result is the sum over ranks, in order, of sums over experts. `docs/kernels/experts.md`
has the bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from leanmill.core.dispatch import ExpertCompute, Meanwhile
from leanmill.core.errors import ConfigError
from leanmill.core.product import compute_dtype
from leanmill.kernels.moe_permute.op import moe_unpermute, sort_by_expert, spread_rows
from leanmill.parallel.dispatch_sizes import Sizes, agree_on_chunks, agree_on_sizes
from leanmill.parallel.exchange import Travelling, TravellingRouting


class AllToAllDispatch:
    """Experts spread over the ranks of a group, each rank holding the next num_experts / ranks of them.

    Rank r of the group holds experts r x E/n to (r+1) x E/n - 1. Every rank calls it for each layer and
    micro-batch, with however many tokens it has, none included; results and gradients are those of all
    experts on one rank, to rounding. Experts' weights get the *sum* of the gradients of all ranks' tokens.

    In a compiled block it is a graph break: how many rows travel is known to the host only when they do.
    With activation checkpointing it runs again, with the same collectives in the same order on each rank,
    unless the checkpoint keeps what collectives returned.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int, *, num_chunks: int = 1) -> None:
        """Spread `num_experts` over `group`.

        Args:
            group: The ranks.
            num_experts: Of all ranks.
            num_chunks: Pieces of each rank's tokens that travel one after the other, so that one piece is
                computed while the next travels. Equal on all ranks, which the first call makes sure of.

        Raises:
            ConfigError: The group's size does not divide the experts, or no chunk is asked for.
        """
        if num_experts % group.size():
            raise ConfigError(
                f"{num_experts} experts cannot be spread over {group.size()} ranks evenly; set layout.ep to a divisor "
                f"of {num_experts}"
            )
        if num_chunks < 1:
            raise ConfigError(f"num_chunks is {num_chunks}; it must be at least 1")
        self.group, self.num_experts, self.num_chunks = group, num_experts, num_chunks
        self.num_local_experts = num_experts // group.size()
        self._has_agreed = False

    def __deepcopy__(self, memo: Any) -> AllToAllDispatch:
        """A copy of a model meets the same ranks."""
        return self

    @torch.compiler.disable
    def __call__(
        self,
        compute: ExpertCompute,
        tokens: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        *,
        meanwhile: Meanwhile | None = None,
    ) -> Tensor:
        """See `leanmill.core.dispatch.Dispatch`.

        Raises:
            RunError: Ranks disagree on what travels, or one routes to an expert that does not exist; raised
                on all ranks, before tokens are sent.
        """
        if not self._has_agreed:
            agree_on_chunks(self.num_chunks, self.group, tokens.device)
            self._has_agreed = True
        # As the products would cast them: fewer bytes, the same rows.
        tokens = tokens.to(compute_dtype(tokens))
        weights = top_k_weights.to(torch.promote_types(top_k_weights.dtype, torch.float32))
        ranks = top_k_index.clamp(0, self.num_experts) // self.num_local_experts
        rows = once_a_rank(ranks, self.group.size())
        options: dict[str, Any] = {"num_experts": self.num_experts, "num_chunks": self.num_chunks, "group": self.group}
        sizes = agree_on_sizes(rows, ranks, tokens, top_k_index, weights, **options)
        parts = (part.tensor_split(self.num_chunks) for part in (tokens, top_k_index, weights, ranks, rows))
        chunks = [Chunk(self.num_local_experts, *piece) for piece in zip(sizes, *parts, strict=True)]
        chunks[0].send()
        for chunk, after in zip(chunks, [*chunks[1:], None], strict=True):
            if after is not None:
                after.send()
            if meanwhile is not None and chunk is chunks[0]:
                meanwhile()
            chunk.compute(compute)
        return torch.cat([chunk.result() for chunk in chunks]) if len(chunks) > 1 else chunks[0].result()


class Chunk:
    """Some of a rank's tokens, on their way and back."""

    def __init__(
        self,
        num_local_experts: int,
        sizes: Sizes,
        tokens: Tensor,
        top_k_index: Tensor,
        weights: Tensor,
        ranks: Tensor,
        rows: Tensor,
    ) -> None:
        """Take tokens [T, H] and their routing.

        Args:
            num_local_experts: Of each rank.
            sizes: What travels.
            tokens: [T, H].
            top_k_index: [T, K].
            weights: [T, K].
            ranks: [T, K]: the rank of each copy's expert; the number of ranks for a dropped copy.
            rows: [T, K]: likewise, for the copies that a row is sent for.
        """
        self.num_local_experts, self.sizes = num_local_experts, sizes
        self.tokens, self.top_k_index, self.weights, self.ranks, self.rows = tokens, top_k_index, weights, ranks, rows

    def send(self) -> None:
        """Begin to send tokens and routing."""
        splits, num_rows = self.sizes.splits, sum(self.sizes.splits.send)
        order, self.positions, _ = sort_by_expert(self.rows, splits.group.size())
        self._routing_under_way = TravellingRouting(*self._routing(order[:num_rows]), splits)
        self._tokens_under_way = Travelling(spread_rows(self.tokens, self.positions, num_rows), splits)

    def compute(self, compute: ExpertCompute) -> None:
        """Wait for rows, have the experts here computed, and begin to send results back."""
        weights, index = self._routing_under_way.arrive()
        tokens = self._tokens_under_way.arrive()
        options: dict[str, Any] = {"num_experts": self.num_local_experts, "num_copies": self.sizes.num_copies}
        out = compute(tokens, index, weights, **options)
        self._results_under_way = Travelling(out, self.sizes.splits.reversed())

    def result(self) -> Tensor:
        """Wait for results and sum those of each token [T, H]."""
        return _SumToTokens.apply(self._results_under_way.arrive(), self.positions)  # type: ignore[no-any-return]

    def _routing(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """Combine weights and index [P, K] of each row sent: zero and "no expert" for copies of other ranks."""
        rank = self.rows.flatten()[order].unsqueeze(1)
        token = order // self.rows.shape[1]
        is_there = self.ranks[token] == rank
        first = rank * self.num_local_experts
        index = torch.where(is_there, self.top_k_index[token] - first, self.num_local_experts)
        return torch.where(is_there, self.weights[token], 0.0), index


class _SumToTokens(torch.autograd.Function):
    """`moe_unpermute`, which hands a recomputation nothing to reach for.

    Positions [T, K] are kept past the hooks that would have them recomputed, and with them the trip that
    brings results back, and the product before it.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, positions: Tensor) -> Tensor:
        ctx.positions, ctx.num_rows = positions, rows.shape[0]
        return moe_unpermute(rows, positions)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return spread_rows(grad, ctx.positions, ctx.num_rows), None


def once_a_rank(ranks: Tensor, num_ranks: int) -> Tensor:
    """Keep the first copy for each rank of each token of `ranks` [T, K]; the others become `num_ranks`."""
    is_equal = ranks.unsqueeze(2) == ranks.unsqueeze(1)
    is_repeated = is_equal.tril(-1).any(2)
    return ranks.masked_fill(is_repeated, num_ranks)
