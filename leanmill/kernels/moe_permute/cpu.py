"""Sorting by counting and moving rows on the CPU in C; see `naive` for the definitions."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from leanmill.kernels.native import compiler, threads
from leanmill.kernels.native.dtypes import SUFFIXES, pointer
from leanmill.kernels.native.large_pages import large_empty


_GRAIN_COPIES = 65_536
"""Fewer copies a thread sort faster in one go than in pieces that are put together."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None without a C compiler."""
    return compiler.load_library(Path(__file__).with_name("cpu.c"))


def sort_by_expert(expert_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return `naive.sort_by_expert`; an index outside [0, num_experts] raises ValueError."""
    native = _loaded()
    experts = expert_index.reshape(-1).to(torch.int64).contiguous()
    num_copies = experts.numel()
    num_pieces = max(1, min(torch.get_num_threads(), num_copies // _GRAIN_COPIES))
    bounds = [num_copies * piece // num_pieces for piece in range(num_pieces + 1)]
    counts = torch.empty(num_pieces, num_experts + 1, dtype=torch.int64)
    order, positions = torch.empty_like(experts), torch.empty(expert_index.shape, dtype=torch.int64)
    is_outside = []

    def count(first: int, last: int) -> None:
        for piece in range(first, last):
            arguments = (pointer(experts), *_longs(*bounds[piece : piece + 2], num_experts), pointer(counts[piece]))
            is_outside.append(native.histogram(*arguments))

    def place(first: int, last: int) -> None:
        for piece in range(first, last):
            outputs = (pointer(starts[piece]), pointer(order), pointer(positions))
            native.place(pointer(experts), *_longs(*bounds[piece : piece + 2]), *outputs)

    threads.parallel_for(count, num_pieces, _GRAIN_COPIES)
    if any(is_outside):
        raise ValueError(
            f"expert index {tuple(expert_index.shape)} holds {int(experts.min())} .. {int(experts.max())}; allowed: "
            f"0 .. {num_experts - 1}, and {num_experts} for a copy that no expert takes"
        )
    # Piece by piece within an expert keeps the sort stable.
    by_expert = counts.t().reshape(-1)
    starts = (by_expert.cumsum(0) - by_expert).view(num_experts + 1, num_pieces).t().contiguous()
    threads.parallel_for(place, num_pieces, _GRAIN_COPIES)
    return order, positions, counts.sum(0)[:num_experts]


def invert(positions: Tensor) -> Tensor:
    """Return `naive.invert`; ValueError where `positions` is no permutation."""
    flat = positions.reshape(-1).to(torch.int64).contiguous()
    order = torch.full_like(flat, -1)
    if _loaded().invert(pointer(flat), *_longs(flat.numel()), pointer(order)):
        raise ValueError(
            f"positions {tuple(positions.shape)} are no permutation of 0 .. {flat.numel() - 1}; "
            f"pass those that `sort_by_expert` returned"
        )
    return order


def spread(tokens: Tensor, positions: Tensor, weights: Tensor | None = None, num_rows: int | None = None) -> Tensor:
    """Return `naive.spread`, multiplied in fp32 and rounded once."""
    rows = large_empty(tokens, positions.numel() if num_rows is None else num_rows, tokens.shape[1])
    _over_tokens("spread", tokens, positions, weights, rows, num_rows=rows.shape[0])
    return rows


def combine(rows: Tensor, positions: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return `naive.combine`: summed in fp32 in the order of k, rounded once."""
    tokens = large_empty(rows, positions.shape[0], rows.shape[1])
    _over_tokens("combine", rows, positions, weights, tokens, num_rows=rows.shape[0])
    return tokens


def dots(rows: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Return `naive.dots`."""
    products = torch.empty(positions.shape, dtype=torch.float32)
    tokens = tokens.contiguous()
    _over_tokens("dots", rows, positions, tokens, products, num_rows=rows.shape[0])
    return products


def _over_tokens(
    name: str, source: Tensor, positions: Tensor, other: Tensor | None, out: Tensor, *, num_rows: int
) -> None:
    function = _loaded()[f"{name}_{SUFFIXES[source.dtype]}"]
    source, positions = source.contiguous(), positions.contiguous()
    # A stray position would be a stray address.
    invert(positions)
    if name != "dots" and other is not None:
        other = other.float().contiguous()
    middle = None if other is None else pointer(other)
    (num_tokens, top_k), width = positions.shape, source.shape[1]

    def run(first: int, last: int) -> None:
        sizes = _longs(first, last, top_k, width, num_rows)
        function(pointer(source), pointer(positions), middle, pointer(out), *sizes)

    threads.parallel_for(run, num_tokens, top_k * width)


def _loaded() -> ctypes.CDLL:
    native = library()
    assert native is not None
    return native


def _longs(*values: int) -> tuple[ctypes.c_long, ...]:
    return tuple(ctypes.c_long(value) for value in values)
