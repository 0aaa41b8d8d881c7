"""Which tokens of a row a block runs for, and what its other arguments are for those alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanmill.core.documents import as_tensor
from leanmill.core.errors import RunError


CUT_ARGUMENTS = frozenset({"attention_mask", "position_ids", "position_embeddings"})
"""Tensors beside hidden states that a block may take: these can be cut down to some of a row's tokens."""
NUM_SIZES = 8
"""Where rows choose for themselves, the number computed for each is one of so many: compiled blocks have a graph for
each, and the largest row decides."""


class Choice(NamedTuple):
    """The tokens that a block runs for."""

    places: Tensor
    """[B, K] int64: places in the row, rising."""
    is_chosen: Tensor | None
    """[B, K] bool, where rows choose fewer than K: the rest, at the end, are computed for nothing. None: all are."""


def choose(priority: Tensor, num: int, counts: Tensor | None = None) -> Choice:
    """Return the `num` tokens of highest priority in each row, the earlier ones among equals.

    Args:
        priority: [B, S].
        num: K.
        counts: [B] int64, at most K: how many each row chooses; None is K.
    """
    order = priority.detach().sort(dim=-1, descending=True, stable=True).indices[:, :num]
    if counts is None:
        return Choice(order.sort(-1).values, None)
    num_tokens = priority.shape[-1]
    is_filler = torch.arange(num, device=order.device) >= counts[:, None]
    places = torch.where(is_filler, order + num_tokens, order).sort(-1).values
    return Choice(places % num_tokens, places < num_tokens)


def size_for(most: int, num_tokens: int) -> int:
    """Return K for rows that choose `most` tokens or fewer: a multiple of an eighth of the row."""
    unit = -(-num_tokens // NUM_SIZES)
    return min(num_tokens, max(1, -(-most // unit)) * unit)


def take(rows: Tensor, index: Tensor) -> Tensor:
    """Return the tokens `index` [B, K] of rows [B or 1, S, ...]: [B, K, ...]."""
    rows = rows.expand(index.shape[0], *rows.shape[1:])
    wide = index.reshape(*index.shape, *[1] * (rows.dim() - 2))
    return rows.gather(1, wide.expand(*index.shape, *rows.shape[2:]))


def cut_arguments(arguments: Mapping[str, Any], choice: Choice) -> dict[str, Any]:
    """Return a block's arguments beside its hidden states for the chosen tokens alone.

    Positions are those of the whole row, and what could not see each other there cannot here: documents of a packed
    row stay apart. Tokens computed for nothing stand last, where no other sees them.
    """
    if arguments.get("past_key_values") is not None:
        raise RunError("mixture_of_depths has no cache of keys and values; call the model with use_cache=False")
    cut = dict(arguments)
    for name in CUT_ARGUMENTS & cut.keys():
        cut[name] = (
            cut_mask(cut[name], choice) if name == "attention_mask" else _cut_positions(cut[name], choice.places)
        )
    return cut


def _cut_positions(value: Any, index: Tensor) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_cut_positions(part, index) for part in value)
    return value if value is None else take(value, index)


def cut_mask(mask: Any, choice: Choice) -> Any:
    """Return an attention mask for the chosen tokens.

    Args:
        mask: None (causal), [B or 1, heads or 1, S, S] of bool or of what is added to scores, `Documents`, or a
            BlockMask.
        choice: K tokens of each row.

    Returns:
        The same in K instead of S.
    """
    mask = as_tensor(mask)
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        return _cut_block_mask(mask, choice)
    index, device = choice.places, mask.device
    if mask.dim() != 4:
        raise RunError(
            f"mixture_of_depths knows attention masks [B, 1, S, S], not {list(mask.shape)}; set model.attention=sdpa"
        )
    rows = torch.arange(index.shape[0] if mask.shape[0] > 1 else 1, device=device).view(-1, 1, 1, 1)
    heads = torch.arange(mask.shape[1], device=device).view(1, -1, 1, 1)
    cut = mask[rows, heads, index[:, None, :, None], index[:, None, None, :]]
    if choice.is_chosen is None:
        return cut
    hidden = torch.ones(index.shape[1], index.shape[1], dtype=torch.bool, device=device).triu(1)
    return cut.masked_fill(hidden, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)


def _cut_block_mask(mask: Any, choice: Choice) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    index, whole = choice.places, mask.mask_mod

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return whole(row, head, index[row, query], index[row, key]) & (query >= key)

    num_rows, num = index.shape
    return create_block_mask(sees, num_rows, None, num, num, device=str(index.device))
