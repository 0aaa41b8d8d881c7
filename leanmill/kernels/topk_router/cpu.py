"""The router on the CPU in C: each row of logits is read once, and kept in cache for the rest."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from leanmill.kernels.native import compiler, threads
from leanmill.kernels.native.dtypes import SUFFIXES, pointer
from leanmill.kernels.topk_router.settings import Settings


_BLOCK_ROWS = 512
"""Rows summed on their own: sums are the same on any number of threads."""
_ELEMENT_COST = 32
"""A logit costs as much as this many elements of a plain pass."""


class _Router(ctypes.Structure):
    _fields_ = [
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_experts", "top_k", "is_sigmoid", "normalise")),
        ("scaling", ctypes.c_float),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None without a C compiler."""
    return compiler.load_library(Path(__file__).with_name("cpu.c"))


def covers(token_mask: Tensor | None, settings: Settings) -> bool:
    """Whether `topk_router` knows these."""
    return token_mask is None and settings.num_groups == settings.num_sequences == 1


def topk_router(
    logits: Tensor, bias: Tensor | None, token_mask: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what `naive.topk_router` does, for contiguous logits."""
    num_tokens, num_experts = logits.shape
    top_k = settings.top_k
    bias = None if bias is None else bias.float().contiguous()
    router = _router(bias, num_experts, settings)
    num_blocks = -(-num_tokens // _BLOCK_ROWS)
    index = torch.empty(num_tokens, top_k, dtype=torch.int64)
    weights = torch.empty(num_tokens, top_k)
    counts = torch.empty(num_blocks, num_experts, dtype=torch.int64)
    sums = torch.empty(num_blocks, num_experts + 1, dtype=torch.float64)
    function = _function("route", logits.dtype)

    def run(first_block: int, last_block: int) -> None:
        scratch = torch.empty(5 * num_experts)
        for block in range(first_block, last_block):
            first, last = block * _BLOCK_ROWS, min((block + 1) * _BLOCK_ROWS, num_tokens)
            outputs = map(pointer, (index, weights, counts[block], sums[block], scratch))
            rows = (ctypes.c_long(first), ctypes.c_long(last))
            function(ctypes.byref(router), pointer(logits, first * num_experts), *outputs, *rows)

    threads.parallel_for(run, num_blocks, _BLOCK_ROWS * num_experts * _ELEMENT_COST)
    means = (sums.sum(0) / max(num_tokens, 1)).float()
    return weights, index, counts.sum(0, keepdim=True), means[0].clone(), means[None, 1:].clone()


def backward(
    logits: Tensor,
    index: Tensor,
    token_mask: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
    settings: Settings,
) -> Tensor:
    """Return what `naive.backward` does, for contiguous logits."""
    num_tokens, num_experts = logits.shape
    grad_weights, grad_z, grad_mean = (grad.float().contiguous() for grad in grads)
    router = _router(None, num_experts, settings)
    out = torch.empty_like(logits)
    function = _function("route_backward", logits.dtype)
    upstream_z = ctypes.c_float(grad_z.item())

    def run(first: int, last: int) -> None:
        scratch = torch.empty(6 * num_experts)
        inputs = map(pointer, (logits, index, grad_weights, grad_mean))
        outputs = map(pointer, (out, scratch))
        rows = (ctypes.c_long(first), ctypes.c_long(last))
        function(ctypes.byref(router), *inputs, upstream_z, ctypes.c_long(num_tokens), *outputs, *rows)

    threads.parallel_for(run, num_tokens, num_experts * _ELEMENT_COST)
    return out


def _router(bias: Tensor | None, num_experts: int, settings: Settings) -> _Router:
    address = None if bias is None else bias.data_ptr()
    numbers = settings.top_k, int(settings.is_sigmoid), int(settings.normalise)
    return _Router(address, num_experts, *numbers, settings.scaling)


def _function(name: str, dtype: torch.dtype) -> ctypes._NamedFuncPointer:
    native = library()
    assert native is not None
    return native[f"{name}_{SUFFIXES[dtype]}"]
