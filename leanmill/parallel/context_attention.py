"""Attention of ranks that each have a part of every row, in the place of transformers' own.

Two ways to the keys and values of other ranks. `ulysses`: a rank gives away heads for places, attends over whole rows
with some of the heads, and gives places away for heads (arXiv:2309.14509). `all_gather`: a rank gathers all keys
and values, and attends with the queries of its own places (as in Llama 3, arXiv:2407.21783).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.errors import RunError
from leanmill.parallel.context_documents import DocumentAttention, Groups
from leanmill.parallel.context_exchange import all_places, heads_for_rows, rows_for_heads
from leanmill.parallel.context_plan import repeats


NAME = "leanmill_context_parallel"
"""In transformers' registries."""


def register(attention: ContextAttention) -> None:
    """Put the attention of this process into transformers' registries, under `NAME`; the last one counts."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    # Masks are made here, of whole rows: a model knows only its part.
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *args, **kwargs: None)


class ContextAttention:
    """An attention function as transformers calls it. Rows that are whole here are attended to as they are.

    Args:
        group: The ranks that share rows, in the order of their parts.
        kind: How they come to keys and values, see `layout.cp_attention`.
        groups: Those that share documents, where rows are cut by document.
    """

    def __init__(
        self, group: dist.ProcessGroup, kind: Literal["ulysses", "all_gather"], groups: Groups | None = None
    ) -> None:
        self._group, self._kind = group, kind
        self._masks = _Masks()
        self._of_documents = DocumentAttention(groups or {}, kind)

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        document_ids: Tensor | None = None,
        document_parts: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Return the values attended to [B, S / n, H, D], and no weights; all this rank's tokens are one row of parts.

        Args:
            module: The attention layer.
            query: [B, H, S / n, D], this rank's part of the rows.
            key: [B, G, S / n, D]; G divides H.
            value: [B, G, S / n, Dv].
            attention_mask: None: masks come from `document_ids`.
            scaling: Of the products.
            dropout: 0.
            sliding_window: Places that a token sees, itself among them.
            document_ids: [B, S] int64, of whole rows: a token sees those of its own document up to itself.
            document_parts: Of rows that are cut by document, in place of those, see `DocumentAttention`.
            **kwargs: What a family gives besides; of those that change attention none may be set.

        Raises:
            RunError: The family asks for more than this computes.
        """
        changed = [name for name in ("softcap", "s_aux", "head_mask") if kwargs.get(name) is not None]
        is_said = document_ids is not None or document_parts is not None
        if not is_said or attention_mask is not None or dropout or changed:
            raise RunError(
                f"attention in {type(module).__name__} asks for more than ranks that share rows compute "
                f"({', '.join(changed) or 'document ids, masks or dropout'}); set layout.cp=1"
            )
        if document_parts is not None:
            found = self._of_documents(query, key, value, document_parts, sliding_window, scaling)
            return found.transpose(1, 2).contiguous(), None
        assert document_ids is not None
        num_ranks, length = self._group.size(), query.shape[2]
        is_cut = length * num_ranks == document_ids.shape[1]
        if not is_cut and length != document_ids.shape[1]:
            raise RunError(f"{length} places of rows of {document_ids.shape[1]} are no part of {num_ranks} ranks")
        settings = (document_ids, sliding_window, scaling)
        if not is_cut:
            found = self._attend(query, key, value, 0, *settings)
        elif self._kind == "all_gather":
            key, value = all_places(key, self._group), all_places(value, self._group)
            found = self._attend(query, key, value, self._group.rank() * length, *settings)
        else:
            # The gradient of a head is the sum over its copies, on whichever rank.
            copies = repeats(query.shape[1], key.shape[1], num_ranks)
            key, value = (tensor.repeat_interleave(copies, 1) for tensor in (key, value))
            query, key, value = (heads_for_rows(tensor, self._group) for tensor in (query, key, value))
            found = rows_for_heads(self._attend(query, key, value, 0, *settings), self._group)
        return found.transpose(1, 2).contiguous(), None

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        first: int,
        document_ids: Tensor,
        window: int | None,
        scaling: float | None,
    ) -> Tensor:
        """Attend with queries of the places from `first` on to keys of all places."""
        mask = self._masks.of(document_ids, first, query.shape[2], window)
        copies = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(copies, 1) for tensor in (key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


class _Masks:
    """Makes masks; those of the last batch are kept, since all layers ask for the same."""

    def __init__(self) -> None:
        self._document_ids: Tensor | None = None
        self._made: dict[tuple[int, int, int | None], Tensor] = {}

    def of(self, document_ids: Tensor, first: int, length: int, window: int | None) -> Tensor:
        """Return which keys [S] each query sees: bool [B, 1, `length`, S]."""
        if self._document_ids is not document_ids:
            self._document_ids, self._made = document_ids, {}
        if (first, length, window) not in self._made:
            self._made[first, length, window] = seen(document_ids, first, length, window)
        return self._made[first, length, window]


def seen(document_ids: Tensor, first: int, length: int, window: int | None) -> Tensor:
    """Return which places the queries at places [first, first + length) see: bool [B, 1, length, S].

    Args:
        document_ids: [B, S] int64.
        first: Place of the first query.
        length: Queries.
        window: Places that a token sees at most, itself among them; None for all before it.
    """
    places = torch.arange(document_ids.shape[1], device=document_ids.device)
    queries = places[first : first + length, None]
    near = places <= queries
    if window is not None:
        near &= places > queries - window
    same = document_ids[:, first : first + length, None] == document_ids[:, None]
    return (same & near)[:, None]
