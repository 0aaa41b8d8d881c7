"""The router on the CPU in C: each row of logits is read once, and kept in cache for the rest."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from leanmill.kernels.native import compiler, threads
from leanmill.kernels.native.dtypes import SUFFIXES, pointer
from leanmill.kernels.topk_router.settings import Settings, num_counted


_BLOCK_ROWS = 512
"""Rows summed on their own: sums are the same on any number of threads."""
_ELEMENT_COST = 32
"""A logit costs as much as this many elements of a plain pass."""
_NUMBERS = (
    *("num_experts", "top_k", "is_sigmoid", "normalise", "num_groups", "open_groups", "num_best"),
    "sequence_length",
)


class _Router(ctypes.Structure):
    _fields_ = [
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("scaling", ctypes.c_float),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None without a C compiler."""
    return compiler.load_library(Path(__file__).with_name("cpu.c"))


def topk_router(
    logits: Tensor, bias: Tensor | None, token_mask: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what `naive.topk_router` does, for contiguous logits."""
    num_tokens, num_experts = logits.shape
    num_sequences = settings.num_sequences
    bias = None if bias is None else bias.float().contiguous()
    mask = None if token_mask is None else token_mask.contiguous()
    router = _router(bias, logits, settings)
    num_blocks = -(-router.sequence_length // _BLOCK_ROWS) * num_sequences
    index = torch.empty(num_tokens, settings.top_k, dtype=torch.int64)
    weights = torch.empty(num_tokens, settings.top_k)
    counts = torch.empty(num_blocks, num_experts, dtype=torch.int64)
    sums = torch.empty(num_blocks, num_experts + 1, dtype=torch.float64)
    function = _function("route", logits.dtype)

    def run(first: int, last: int) -> None:
        scratch = torch.empty(9 * num_experts)
        operands = (pointer(logits), _address(mask), *map(pointer, (index, weights, counts, sums, scratch)))
        function(ctypes.byref(router), *operands, *map(ctypes.c_long, (_BLOCK_ROWS, first, last)))

    rows = min(_BLOCK_ROWS, router.sequence_length)
    threads.parallel_for(run, num_blocks, rows * num_experts * _ELEMENT_COST)
    by_sequence = sums.view(num_sequences, -1, num_experts + 1).sum(1)
    counted = num_counted(logits, token_mask, settings)
    z_loss = by_sequence[:, 0].sum() / counted.sum().clamp(min=1)
    means = by_sequence[:, 1:] / counted.clamp(min=1).unsqueeze(-1)
    return weights, index, counts.view(num_sequences, -1, num_experts).sum(1), z_loss.float(), means.float()


def backward(
    logits: Tensor,
    index: Tensor,
    token_mask: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
    settings: Settings,
) -> Tensor:
    """Return what `naive.backward` does, for contiguous logits."""
    num_tokens, num_experts = logits.shape
    grad_weights, grad_z, grad_mean = (grad.float() for grad in grads)
    counted = num_counted(logits, token_mask, settings)
    operands = index, grad_weights.contiguous(), grad_mean / counted.clamp(min=1).unsqueeze(-1)
    upstream_z = ctypes.c_float(float(grad_z / counted.sum().clamp(min=1)))
    mask = None if token_mask is None else token_mask.contiguous()
    router = _router(None, logits, settings)
    out = torch.empty_like(logits)
    function = _function("route_backward", logits.dtype)

    def run(first: int, last: int) -> None:
        scratch = torch.empty(6 * num_experts)
        inputs = (pointer(logits), _address(mask), *map(pointer, operands))
        rows = (ctypes.c_long(first), ctypes.c_long(last))
        function(ctypes.byref(router), *inputs, upstream_z, *map(pointer, (out, scratch)), *rows)

    threads.parallel_for(run, num_tokens, num_experts * _ELEMENT_COST)
    return out


def _address(tensor: Tensor | None) -> ctypes.c_void_p | None:
    return None if tensor is None else pointer(tensor)


def _router(bias: Tensor | None, logits: Tensor, settings: Settings) -> _Router:
    address = None if bias is None else bias.data_ptr()
    *numbers, num_sequences = settings.numbers()
    return _Router(address, logits.shape[1], *numbers, logits.shape[0] // num_sequences, settings.scaling)


def _function(name: str, dtype: torch.dtype) -> ctypes._NamedFuncPointer:
    native = library()
    assert native is not None
    return native[f"{name}_{SUFFIXES[dtype]}"]
