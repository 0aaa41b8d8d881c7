"""Softmax attention in a window, linear attention behind it, in time and memory linear in the length.

Imports nothing of Leanmill, so that it can travel with a model's weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


CHUNK = 64
"""Tokens that are computed together, at least; windows are no longer than a chunk."""


def in_fp32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep autocast, which would have matmuls give bf16, out of a function of tensors."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapped


@in_fp32
def hybrid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_features: Tensor,
    key_features: Tensor,
    factor: Tensor,
    documents: Tensor,
    *,
    window: int,
    scaling: float,
    state: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Return LoLCATs' attention [B, heads, Q, d] fp32 (Zhang et al. 2024, arXiv:2410.10254, equation 6).

    For the query of token n, over the keys m <= n of its document, those of the window being the last `window`,

        y = (sum_window g exp(s_nm - max s_n) v_m + sum_behind phi(q_n) phi(k_m) v_m) / (the same sums without v),

    s being scaled products of queries and keys and g the factor of the head.

    Args:
        query: Of the last Q of K tokens [B, heads, Q, d].
        key: [B, heads, K, d].
        value: [B, heads, K, d].
        query_features: phi(q) [B, heads, Q, f].
        key_features: phi(k) [B, heads, K, f].
        factor: g [heads].
        documents: What each of the K tokens belongs to [B, K]: numbers that grow; -1 is padding.
        window: Tokens of the window.
        scaling: Of products of queries and keys.
        state: Sum of phi(k) (v, 1)^T over tokens before these, all behind the window [B, heads, f, d + 1] fp32.
        chunk: Tokens that are computed together, at least.
    """
    query, key, value, query_features, key_features = (
        tensor.float() for tensor in (query, key, value, query_features, key_features)
    )
    gain, chunk = factor.float()[:, None, None], max(chunk, window)
    num_queries, num_keys = query.shape[2], key.shape[2]
    value = torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)
    if num_queries <= chunk or num_keys <= 2 * chunk:
        distance = _distance(num_queries, num_keys, num_keys - num_queries, documents.device)
        same = documents[:, None, -num_queries:, None] == documents[:, None, None, :]
        total = _dense(query, key, value, query_features, key_features, gain, same, distance, window, scaling)
    else:
        # Tokens that no query was given for are computed as if there were one, a window of them at most.
        before = num_keys - num_queries
        query, query_features = (F.pad(tensor, (0, 0, before, 0)) for tensor in (query, query_features))
        total = _chunked(query, key, value, query_features, key_features, gain, documents, window, scaling, chunk)
        total, query_features = total[:, :, before:], query_features[:, :, before:]
    if state is not None:
        real = (documents[:, None, -num_queries:, None] >= 0).to(total)
        total = total + real * (query_features @ state.float())
    return total[..., :-1] / total[..., -1:]


@in_fp32
def summed_state(key_features: Tensor, value: Tensor, kept: Tensor) -> Tensor:
    """Return the sum of phi(k) (v, 1)^T [B, heads, f, d + 1] fp32 over the tokens of `kept` [B, K] bool."""
    value = torch.cat([value.float(), torch.ones_like(value[..., :1], dtype=torch.float32)], dim=-1)
    return (key_features.float() * kept[:, None, :, None]).transpose(-1, -2) @ value


def _distance(num_queries: int, num_keys: int, ahead: int, device: torch.device) -> Tensor:
    """By how many tokens each key lies behind each query [Q, K], the first query being `ahead` of the first key."""
    return torch.arange(num_queries, device=device)[:, None] + ahead - torch.arange(num_keys, device=device)


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_features: Tensor,
    key_features: Tensor,
    gain: Tensor,
    same: Tensor,
    distance: Tensor,
    window: int,
    scaling: float,
) -> Tensor:
    """Both sums, over v and over 1 [..., Q, d + 1], of all pairs of queries and keys."""
    near = same & (distance >= 0) & (distance < window)
    scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~near, torch.finfo(torch.float32).min)
    weights = gain * (scores - scores.amax(-1, keepdim=True)).exp().masked_fill(~near, 0.0)
    behind = query_features @ key_features.transpose(-1, -2)
    return (weights + behind.masked_fill(~(same & (distance >= window)), 0.0)) @ value


def _chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_features: Tensor,
    key_features: Tensor,
    gain: Tensor,
    documents: Tensor,
    window: int,
    scaling: float,
    chunk: int,
) -> Tensor:
    """The same of all tokens, in chunks.

    A chunk's queries meet its keys and those of the chunk before one by one, all earlier ones of their document as one
    sum.
    """
    length = query.shape[2]
    query, key, value, query_features, key_features = (
        _in_chunks(tensor, chunk) for tensor in (query, key, value, query_features, key_features)
    )
    owner = F.pad(documents, (0, -length % chunk), value=-1).unflatten(1, (-1, chunk))
    both = torch.cat([F.pad(owner[:, :-1], (0, 0, 1, 0), value=-2), owner], dim=-1)
    same = (owner[..., None] == both[..., None, :])[:, None]
    distance = _distance(chunk, 2 * chunk, chunk, query.device)
    pairs = (_with_previous(tensor) for tensor in (key, value, key_features))
    keys, values, features = pairs
    total = _dense(query, keys, values, query_features, features, gain[:, None], same, distance, window, scaling)
    # Sums over each chunk's tokens of the document that it ends in, whatever padding there is in between.
    last = owner.amax(-1).cummax(dim=1).values
    ending = (owner == last[..., None])[:, None, ..., None]
    sums = (key_features * ending).transpose(-1, -2) @ value
    # What a chunk's queries meet as one sum ends two chunks back.
    far = F.pad(_summed_over_documents(sums, last)[:, :, :-2], (0, 0, 0, 0, 2, 0))
    theirs = (owner == F.pad(last[:, :-2], (2, 0), value=-2)[..., None])[:, None, ..., None]
    total = total + theirs * (query_features @ far)
    return total.flatten(2, 3)[:, :, :length]


def _summed_over_documents(sums: Tensor, last: Tensor) -> Tensor:
    """Add to the sum of each chunk those of all earlier chunks that end in its document [B, heads, chunks, f, n].

    As many times as the number of chunks has bits, what has been added up is taken from twice as far: no difference of
    large sums, and nothing that grows with the square of the length.
    """
    step = 1
    while step < last.shape[1]:
        is_same = last == F.pad(last[:, :-step], (step, 0), value=-2)
        earlier = F.pad(sums[:, :, :-step], (0, 0, 0, 0, step, 0))
        sums = sums + earlier * is_same[:, None, :, None, None]
        step *= 2
    return sums


def _in_chunks(tensor: Tensor, chunk: int) -> Tensor:
    """[B, heads, K, n] as [B, heads, chunks, chunk, n], zeros behind the last token."""
    return F.pad(tensor, (0, 0, 0, -tensor.shape[2] % chunk)).unflatten(2, (-1, chunk))


def _with_previous(chunks: Tensor) -> Tensor:
    """Each chunk behind the one before it [B, heads, chunks, 2 x chunk, n]."""
    return torch.cat([F.pad(chunks[:, :, :-1], (0, 0, 0, 0, 1, 0)), chunks], dim=3)
