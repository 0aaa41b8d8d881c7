"""Drops by where a token stands in its row: experts that are full by then turn later tokens away."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from leanmill.study.routed import Routed


def dropped_by_capacity(routed: Routed, capacity_factor: float) -> NDArray[np.bool_]:
    """Return which choices [R, S, K] would be dropped if each expert took `capacity_factor` x its even share of a row.

    An expert takes the first ceil(capacity_factor x K x S / E) choices of a row in the order of its tokens, as in
    OpenMoE; padding takes no place.
    """
    num_rows, length, top_k = routed.experts.shape
    capacity = math.ceil(capacity_factor * top_k * length / routed.num_experts)
    is_dropped = np.zeros(routed.experts.shape, dtype=np.bool_)
    for row in range(num_rows):
        experts = np.where(routed.is_real[row][:, None], routed.experts[row], routed.num_experts).ravel()
        order = np.argsort(experts, kind="stable")
        starts = np.searchsorted(experts[order], np.arange(routed.num_experts + 1))
        place = np.empty(len(experts), dtype=np.int64)
        place[order] = np.arange(len(experts)) - starts[experts[order]]
        is_dropped[row] = ((place >= capacity) & (experts < routed.num_experts)).reshape(length, top_k)
    return is_dropped


def rate_by_position(is_dropped: NDArray[np.bool_], is_real: NDArray[np.bool_], num_buckets: int = 16) -> list[float]:
    """Return the share of choices dropped in each of `num_buckets` equal stretches of the row.

    Args:
        is_dropped: [R, S, K].
        is_real: [R, S]: False at padding.
        num_buckets: At most S. A stretch without tokens counts 0.
    """
    length = is_real.shape[1]
    bucket = np.arange(length) * min(num_buckets, length) // length
    dropped = np.bincount(bucket, weights=(is_dropped & is_real[:, :, None]).sum((0, 2)))
    offered = np.bincount(bucket, weights=is_real.sum(0) * is_dropped.shape[2])
    return (dropped / np.maximum(offered, 1)).tolist()
