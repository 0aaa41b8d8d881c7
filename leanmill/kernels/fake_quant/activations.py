"""Activations as 8-bit integers, one scale a token (BitNet b1.58)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanmill.kernels.fake_quant import dispatch
from leanmill.kernels.fake_quant.grid import check_float
from leanmill.kernels.sharded import is_dtensor, on_local_rows


SMALLEST = 1e-5
"""Least magnitude that a token's largest entry counts as, as in BitNet's code."""


def quantise_activations(tokens: Tensor, *, smallest: float = SMALLEST) -> Tensor:
    """Round every token to 8-bit codes and back; the gradient passes unchanged.

    With m = max(max |x|, smallest) over the last dim, codes are clip(round(x * (127 / m)), -128, 127) and the
    result codes * (m / 127), in fp32 (fp64 for fp64) and rounded once: BitNet b1.58 (Ma et al. 2024,
    arXiv:2402.17764; its code divides by 127 / m in the last step, which is the same but for its
    rounding).

    Args:
        tokens: fp32, bf16, fp16 or fp64 [..., in], plain or a DTensor that holds whole rows.
        smallest: Least magnitude a token's largest entry counts as.

    Returns:
        Of the shape and dtype of `tokens`. A token with a NaN is NaN throughout.

    Raises:
        ValueError: Not floating, no dims, `smallest` not positive, or a sharded last dim.
    """
    _check(tokens, smallest)
    return on_local_rows(lambda local: _fake_activations(local, smallest), tokens)


def int8_activations(tokens: Tensor, *, smallest: float = SMALLEST) -> tuple[Tensor, Tensor]:
    """Return the codes and steps of `quantise_activations`, for integer matmuls; not differentiable.

    Args:
        tokens: As in `quantise_activations`, plain.
        smallest: As in `quantise_activations`.

    Returns:
        int8 codes [..., in] and fp32 (fp64 for fp64) steps [..., 1], so that tokens are about codes * steps. A
        token with a NaN has a NaN step.

    Raises:
        ValueError: Not floating, no dims, a DTensor, or `smallest` not positive.
    """
    _check(tokens, smallest)
    if is_dtensor(tokens):
        raise ValueError(
            f"activations {tuple(tokens.shape)} are a DTensor; codes are made of local ones: call to_local()"
        )
    return _int8_activations(tokens, smallest)


def _check(tokens: Tensor, smallest: float) -> None:
    check_float(tokens, "activations")
    if tokens.dim() == 0 or smallest <= 0:
        raise ValueError(
            f"activations {tuple(tokens.shape)} with smallest={smallest}; use [..., in] and a positive number"
        )


@torch.library.custom_op("leanmill::fake_int8_activations", mutates_args=())
def _fake_activations(tokens: Tensor, smallest: float) -> Tensor:
    return dispatch.activations(tokens, smallest, as_codes=False)[0]


@_fake_activations.register_fake
def _(tokens: Tensor, smallest: float) -> Tensor:
    return torch.empty_like(tokens, memory_format=torch.contiguous_format)


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


_fake_activations.register_autograd(_straight_through)


@torch.library.custom_op("leanmill::int8_activations", mutates_args=())
def _int8_activations(tokens: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    return dispatch.activations(tokens, smallest, as_codes=True)


@_int8_activations.register_fake
def _(tokens: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    exact = torch.promote_types(tokens.dtype, torch.float32)
    codes = torch.empty_like(tokens, dtype=torch.int8, memory_format=torch.contiguous_format)
    return codes, tokens.new_empty((*tokens.shape[:-1], 1), dtype=exact)
