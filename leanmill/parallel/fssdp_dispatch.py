"""Where tokens meet experts that are sharded over all ranks, each on one: there, or at a copy here.

Fully sharded sparse data parallelism (Hecate: Qing et al., 2025, arXiv:2502.02581). For each layer and
micro-batch a rank chooses which experts it fetches a copy of; its tokens for those, and for experts of its
own, stay, the others travel to the owner as under expert parallelism. Hecate chooses copies ahead of the
router from earlier steps; here the router has spoken, so what is fetched is what has tokens. That costs no
collective: the choice travels with the sizes that ranks tell each other anyway.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from leanmill.core.account import is_recompute
from leanmill.core.dispatch import ExpertCompute, Meanwhile
from leanmill.core.expert_shards import part_here
from leanmill.core.experts import stacked_parameters
from leanmill.core.product import compute_dtype
from leanmill.parallel.dispatch import Chunk, once_a_rank
from leanmill.parallel.dispatch_sizes import agree_on_sizes
from leanmill.parallel.fssdp_placement import Owners, Prices, fewest_bytes, loaded
from leanmill.parallel.fssdp_travel import Copies, Held


_BITS = 32
"""Experts that one int64 of the table speaks of."""


class FullyShardedDispatch:
    """Brings tokens and experts of one layer together.

    Args:
        module: The stacked experts; holds this rank's own, in ascending order, as local parts of its parameters.
        group: All ranks.
        owners: Of each expert.
        materialise: `loaded` copies all experts that this rank has tokens for; `fewest_bytes` those whose copy
            moves fewer bytes than their tokens would.
        rematerialise: Whether copies are dropped after forward and fetched again in backward.
    """

    def __init__(
        self,
        module: nn.Module,
        group: dist.ProcessGroup,
        owners: Owners,
        *,
        materialise: Literal["loaded", "fewest_bytes"],
        rematerialise: bool,
    ) -> None:
        self._names = stacked_parameters(module)
        self._module = weakref.ref(module)  # which holds this
        self.group, self.owners = group, owners
        self.materialise, self.rematerialise = materialise, rematerialise
        self.travelled: Tensor | None = None
        """Of each expert, in training since `forget`: copies that this rank sent to its owner [0], and chose [1]."""

    def __deepcopy__(self, memo: Any) -> FullyShardedDispatch:
        """A copy of a model meets the same ranks."""
        return self

    @property
    def module(self) -> nn.Module:
        """The stacked experts."""
        found = self._module()
        assert found is not None
        return found

    @property
    def num_experts(self) -> int:
        """Of all ranks."""
        return len(self.owners)

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
                on all ranks, before tokens or experts are sent.
        """
        tokens = tokens.to(compute_dtype(tokens))
        weights = top_k_weights.to(torch.promote_types(top_k_weights.dtype, torch.float32))
        own = [part_here(getattr(self.module, name)) for name in self._names]
        index = top_k_index.clamp(0, self.num_experts)
        owners = torch.tensor(self.owners, device=tokens.device)
        wanted = self._choose(index, owners, own, tokens, weights)
        ranks = _looked_up(owners.masked_fill(wanted, self.group.rank()), index, self.group.size())
        rows = once_a_rank(ranks, self.group.size())
        options: dict[str, Any] = {"num_experts": self.num_experts, "num_chunks": 1, "group": self.group}
        (sizes,) = agree_on_sizes(rows, ranks, tokens, top_k_index, weights, tell=_packed(wanted), **options)
        copies = Copies.of(_unpacked(sizes.told, self.num_experts), self.owners, self.group)
        self._note(index, ranks)
        # As one number an expert and rank, which is what a chunk takes apart again.
        places = ranks * self.num_experts + _looked_up(copies.places(tokens.device), index, 0)
        chunk = Chunk(self.num_experts, sizes, tokens, places, weights, ranks, rows)
        chunk.send()
        if meanwhile is not None:
            meanwhile()
        held = Held(copies, own, tokens.dtype, rematerialise=self.rematerialise)
        chunk.compute(_WithHeld(compute, held, copies.num_held, self._names))
        return chunk.result()

    def _choose(self, index: Tensor, owners: Tensor, own: Sequence[Tensor], tokens: Tensor, weights: Tensor) -> Tensor:
        me = self.group.rank()
        if self.materialise == "loaded":
            return loaded(index, owners, me)
        return fewest_bytes(index, owners, me, self.prices(own, tokens, weights))

    def prices(self, own: Sequence[Tensor], tokens: Tensor, weights: Tensor) -> Prices:
        """Return what a row and an expert cost to move."""
        return Prices.of(
            hidden_size=tokens.shape[1],
            top_k=weights.shape[1],
            parameters_per_expert=sum(tensor.shape[1:].numel() for tensor in own),
            bytes_per_value=tokens.element_size(),
            bytes_per_weight=weights.element_size(),
            rematerialise=self.rematerialise,
            trains=any(tensor.requires_grad for tensor in own),
        )

    @torch.no_grad()
    def _note(self, index: Tensor, ranks: Tensor) -> None:
        if is_recompute() or not self.module.training:
            return
        sent = index.masked_fill(ranks == self.group.rank(), self.num_experts)
        counts = index.new_zeros(2, self.num_experts + 1)
        for row, chosen in zip(counts, (sent.flatten(), index.flatten()), strict=True):
            row.scatter_add_(0, chosen, torch.ones_like(chosen))
        counts = counts[:, : self.num_experts]
        self.travelled = counts if self.travelled is None else self.travelled + counts

    def forget(self) -> None:
        """Begin to count anew."""
        self.travelled = None


class _WithHeld:
    """Computes with the experts that were fetched."""

    def __init__(self, compute: ExpertCompute, held: Held, num_held: int, names: Sequence[str]) -> None:
        self._compute, self._held, self._num_held, self._names = compute, held, num_held, names

    def __call__(
        self, tokens: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, num_copies: int | None = None, **_: Any
    ) -> Tensor:
        weights = dict(zip(self._names, self._held.weights, strict=True))
        # "No expert" is the number of all of them to a sender, which need not know how many are here.
        index = top_k_index.clamp(max=self._num_held)
        options: dict[str, Any] = {"num_experts": self._num_held, "num_copies": num_copies, "weights": weights}
        return self._held.done(self._compute(tokens, index, top_k_weights, **options))


def _looked_up(table: Tensor, index: Tensor, dropped: int) -> Tensor:
    """Return `table` [E] at `index`, `dropped` where that is E."""
    return torch.cat([table, table.new_full((1,), dropped)])[index]


def _packed(chosen: Tensor) -> Tensor:
    """Return bool [E] as bits of int64."""
    words = torch.nn.functional.pad(chosen.long(), (0, -len(chosen) % _BITS)).view(-1, _BITS)
    return (words << torch.arange(_BITS, device=chosen.device)).sum(1)


def _unpacked(words: Sequence[Sequence[int]], num_experts: int) -> Tensor:
    """Return the bits of every rank as bool [ranks, E] on the host."""
    bits = torch.tensor(words).unsqueeze(2) >> torch.arange(_BITS) & 1
    return bits.flatten(1)[:, :num_experts].bool()
