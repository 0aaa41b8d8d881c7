"""Attention that goes document by document, in the place of transformers' own.

A packed row holds many documents, and sdpa with a mask multiplies all of a row with all of it: of rows of ten equal
documents nine tenths are masked away. Here every document is a causal attention of its own, and no mask is made. The
documents are read off the function that transformers would make a mask from, at a number of places that is linear in
the row: what is no causal attention within documents (or a window of them) gets transformers' mask and sdpa.

Lengths of documents are Python numbers, so this suits the CPU: CUDA has flex_attention, and compiled blocks would have
a graph for every batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.documents import Documents, places_seen
from leanmill.core.errors import RunError


NAME = "per_document"
"""In transformers' registries, and of `model.attention`."""
_UNKNOWN = ("softcap", "s_aux", "head_mask", "position_bias")
"""What a family may add to attention that is not computed here."""

_Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def register() -> None:
    """Make it known to transformers by `NAME`."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, document_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, document_mask)


def has_document_attention(model_class: Any) -> bool:
    """Whether a family's attention is sdpa's, and hands on masks that are no tensors.

    Args:
        model_class: A `PreTrainedModel` of causal language models, or None.
    """
    # Families that take a BlockMask leave what they get as it is; others cut masks as tensors.
    return bool(getattr(model_class, "_supports_sdpa", False) and getattr(model_class, "_supports_flex_attn", False))


def plain_attention(model_class: Any) -> str:
    """Return what a family's attention is where nothing is packed; a class that is not known is sdpa's."""
    return "sdpa" if getattr(model_class, "_supports_sdpa", True) else "eager"


def document_mask(**given: Any) -> Documents | Tensor | None:
    """Return the mask of a batch: its documents, or what `sdpa_mask` returns where they do not say it all.

    Args:
        **given: What transformers gives to functions that make masks.
    """
    window, sees = given.get("local_size"), given.get("mask_function")
    # As sdpa does, which then needs no mask: every row is one document. What may have come from a user is not index
    # arithmetic for sure (`use_vmap`), and padding or a cache is no packed row.
    is_packed = given.get("allow_is_causal_skip") is False and given.get("attention_mask") is None
    is_plain = not given.get("use_vmap") and given["q_length"] == given["kv_length"]
    is_whole = not given.get("q_offset") and not given.get("kv_offset")
    device = torch.device(given["device"])
    if sees is not None and is_packed and is_plain and is_whole and device.type != "meta":
        found = _documents(sees, given["batch_size"], given["q_length"], window, device)
        if found is not None:
            return found
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(**given)  # type: ignore[no-any-return]


def _documents(sees: _Sees, num_rows: int, length: int, window: int | None, device: torch.device) -> Documents | None:
    """Return the documents of rows, or None where what `sees` says is not causal attention within some."""
    rows, head = torch.arange(num_rows, device=device)[:, None], torch.zeros((), dtype=torch.int64, device=device)
    places = torch.arange(length, device=device).expand(num_rows, -1)

    def seen(keys: Tensor) -> Tensor:
        return sees(rows, head, places, keys.clamp(0, length - 1)).expand(num_rows, length)

    begins = ~seen(places - 1) | (places == 0)
    begin = torch.where(begins, places, 0).cummax(-1).values
    first = begin if window is None else torch.maximum(begin, places - window + 1)
    is_causal = seen(places).all() & ~(seen(places + 1) & (places < length - 1)).any()
    is_within = seen(first).all() & ~(seen(first - 1) & (first > 0)).any()
    if not is_causal & is_within:
        return None
    starts = torch.nonzero(begins.flatten()).flatten()
    ends = torch.cat([starts[1:], starts.new_tensor([num_rows * length])])
    return Documents(tuple((ends - starts).tolist()), num_rows, window, device)


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Documents | Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return the values attended to [B, S, H, Dv], and no weights.

    Args:
        module: The attention layer.
        query: [B, H, S, D].
        key: [B, G, S, D]; G divides H.
        value: [B, G, S, Dv].
        attention_mask: Documents of the rows; with a tensor, or None for rows that are whole, this is sdpa.
        scaling: Of the products; None for 1 / sqrt(D).
        dropout: Probability.
        **kwargs: What a family gives besides.

    Raises:
        RunError: The family asks for more than this computes.
    """
    if not isinstance(attention_mask, Documents):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    changed = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if changed:
        raise RunError(
            f"attention in {type(module).__name__} asks for more than model.attention={NAME} computes "
            f"({', '.join(changed)}); set model.attention=eager"
        )
    # Split and joined along one dimension: a slice a document would have a gradient as large as the batch each.
    queries, keys, values = (_pieces(tensor, attention_mask.lengths) for tensor in (query, key, value))
    window = attention_mask.window
    found = [
        _attend(*operands, window=window, scaling=scaling, dropout=dropout)
        for operands in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(found).view(query.shape[0], query.shape[2], *found[0].shape[1:]), None


def _pieces(tensor: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Return the documents [L, H, D] of rows [B, H, S, D]."""
    return tensor.transpose(1, 2).flatten(0, 1).split(lengths)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, *, window: int | None, scaling: float | None, dropout: float
) -> Tensor:
    """Return what one document attends to, [L, H, Dv]."""
    length, copies = query.shape[0], query.shape[1] // key.shape[1]
    if copies > 1:
        key, value = key.repeat_interleave(copies, 1), value.repeat_interleave(copies, 1)
    # Within a document longer than its window there is a mask; the same for all of a length, and small beside a row's.
    mask = places_seen(0, length, window, query.device)
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    found = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
    )
    return found[0].transpose(0, 1)
