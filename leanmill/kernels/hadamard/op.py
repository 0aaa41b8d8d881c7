"""Public entries: `hadamard`, `hadamard_` and `quest_quantise`."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from leanmill.kernels.dispatch import Code, choose, implementation
from leanmill.kernels.hadamard import cpu, naive
from leanmill.kernels.sharded import on_local_rows


LARGEST_BLOCK = 4096
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def hadamard(x: Tensor, block_size: int | None = None) -> Tensor:
    """Apply the orthonormal Walsh-Hadamard transform H to every block of the last dim.

    H_2b = [[H_b, H_b], [H_b, -H_b]] / sqrt(2), in Sylvester's order; symmetric and its own inverse,
    so `hadamard(hadamard(x))` is x up to rounding and the gradient is the transform of the gradient.
    Computed in fp32 (fp64 for fp64) and rounded once.

    Args:
        x: Floating [..., n], any strides; a DTensor may be sharded over any dim but the last.
        block_size: 2, 4, .. 4096, dividing n; None takes the largest that does.

    Returns:
        [..., n] in the dtype of `x`.

    Raises:
        ValueError: Another dtype or block size, n not a multiple of it, or a sharded last dim.
    """
    block_size = _checked(x, block_size)
    return on_local_rows(lambda local: torch.ops.leanmill.hadamard(local, block_size), x)


def hadamard_(x: Tensor, block_size: int | None = None) -> Tensor:
    """Apply `hadamard` in place and return `x`; not differentiable.

    Raises:
        ValueError: What `hadamard` refuses, or `x` needs a gradient.
    """
    block_size = _checked(x, block_size)
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(f"x {tuple(x.shape)} needs a gradient, which hadamard_ does not give; use hadamard")

    def in_place(local: Tensor) -> Tensor:
        torch.ops.leanmill.hadamard_(local, block_size)
        return local

    on_local_rows(in_place, x)
    return x


def quest_quantise(x: Tensor, num_bits: int | Literal["ternary"], block_size: int | None = None) -> Tensor:
    """Quantise the Hadamard transform of every row as QuEST does (Panferov 2025, arXiv:2502.05003).

    x_h = H x; sigma = RMS of the row's x_h; levels reach from -clip sigma to clip sigma, clip being the
    Gaussian's best for their number: 2^b levels at (k + 1/2) step (none at zero), or {-1, 0, 1} step for
    ternary. The result is not rotated back: rotate the other operand of the matmul too and H cancels.
    Backward is H (mask * dy), the mask passing entries that are within half a step of their level
    (those with |x_h| <= clip sigma + step / 2); sigma counts as a constant.

    Departures: sigma has no epsilon (a row of zeros gives zeros); ternary has levels of its own, since a
    grid of 2^1.585 levels has four; x_h = 0 goes to the level above it.

    Args:
        x: Floating [..., n], any strides; a DTensor may be sharded over any dim but the last.
        num_bits: 1 to 8, or "ternary".
        block_size: As for `hadamard`.

    Returns:
        The quantised x_h [..., n] in the dtype of `x`.

    Raises:
        ValueError: What `hadamard` refuses, or another `num_bits`.
    """
    if num_bits != "ternary" and (isinstance(num_bits, bool) or num_bits not in range(1, 9)):
        raise ValueError(f"num_bits={num_bits!r}; allowed: 1 to 8, or 'ternary'")
    num_levels = 3 if num_bits == "ternary" else 2 ** int(num_bits)
    block_size = _checked(x, block_size)
    return on_local_rows(lambda local: torch.ops.leanmill.quest_quantise(local, num_levels, block_size)[0], x)


def _checked(x: Tensor, block_size: int | None) -> int:
    if x.dtype not in _DTYPES or x.dim() == 0:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; allowed: fp32, bf16, fp16 or fp64 [..., n]")
    length = x.shape[-1]
    if block_size is None:
        # The lowest set bit is the largest power of two that divides.
        block_size = min(length & -length, LARGEST_BLOCK) if length else 2
    is_power = isinstance(block_size, int) and 2 <= block_size <= LARGEST_BLOCK and not block_size & (block_size - 1)
    if not is_power or length % block_size:
        raise ValueError(
            f"block_size={block_size} for x {tuple(x.shape)}; allowed: powers of two from 2 to {LARGEST_BLOCK} that "
            f"divide {length}, the last dim; pad it if there is none"
        )
    return block_size


def _dense(tensor: Tensor) -> Tensor:
    """Without gaps and in order of rows, as kernels read memory."""
    return tensor.contiguous()


@torch.library.custom_op("leanmill::hadamard", mutates_args=())
def _hadamard(x: Tensor, block_size: int) -> Tensor:
    x = _dense(x)
    return _transformed(x, None, torch.empty_like(x), block_size)


@torch.library.custom_op("leanmill::hadamard_", mutates_args=("x",))
def _hadamard_in_place(x: Tensor, block_size: int) -> None:
    if x.is_contiguous():
        _transformed(x, None, x, block_size)
    else:
        x.copy_(_hadamard(x, block_size))


@torch.library.custom_op("leanmill::masked_hadamard", mutates_args=())
def _masked_hadamard(x: Tensor, mask: Tensor, block_size: int) -> Tensor:
    x = _dense(x)
    return _transformed(x, _dense(mask), torch.empty_like(x), block_size)


def _transformed(x: Tensor, mask: Tensor | None, out: Tensor, block_size: int) -> Tensor:
    if x.numel() == 0:
        return out
    code = choose("hadamard", x, c=cpu.library)
    if code is Code.TENSORS:
        return out.copy_(naive.hadamard(x if mask is None else torch.where(mask, x, 0), block_size))
    implementation(__package__, code).hadamard(x, mask, out, block_size)
    return out


@torch.library.custom_op("leanmill::quest_quantise", mutates_args=())
def _quest_quantise(x: Tensor, num_levels: int, block_size: int) -> tuple[Tensor, Tensor]:
    x = _dense(x)
    if x.numel() == 0:
        return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)

    def fits_a_kernel() -> bool:
        from leanmill.kernels.hadamard import kernel

        return x.shape[-1] <= kernel.LARGEST_ROW

    code = choose("quest_quantise", x, c=cpu.library, triton=fits_a_kernel)
    return implementation(__package__, code).quest_quantise(x, num_levels, block_size)  # type: ignore[no-any-return]


def _fake_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_hadamard.register_fake
def _(x: Tensor, block_size: int) -> Tensor:
    return _fake_like(x)


@_masked_hadamard.register_fake
def _(x: Tensor, mask: Tensor, block_size: int) -> Tensor:
    return _fake_like(x)


@_quest_quantise.register_fake
def _(x: Tensor, num_levels: int, block_size: int) -> tuple[Tensor, Tensor]:
    return _fake_like(x), torch.empty_like(x, dtype=torch.bool, memory_format=torch.contiguous_format)


def _keep_block_size(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.block_size = inputs[-1]


def _hadamard_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.leanmill.hadamard(grad, ctx.block_size), None


def _keep_mask(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.block_size = inputs[-1]
    ctx.save_for_backward(output[1])


def _quest_backward(ctx: Any, grad: Tensor, _grad_of_mask: Tensor | None) -> tuple[Tensor, None, None]:
    (mask,) = ctx.saved_tensors
    return torch.ops.leanmill.masked_hadamard(grad, mask, ctx.block_size), None, None


def _keep_mask_and_block_size(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.block_size = inputs[-1]
    ctx.save_for_backward(inputs[1])


def _masked_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (mask,) = ctx.saved_tensors
    return torch.ops.leanmill.hadamard(grad, ctx.block_size) * mask, None, None


torch.library.register_autograd("leanmill::hadamard", _hadamard_backward, setup_context=_keep_block_size)
torch.library.register_autograd("leanmill::quest_quantise", _quest_backward, setup_context=_keep_mask)
torch.library.register_autograd("leanmill::masked_hadamard", _masked_backward, setup_context=_keep_mask_and_block_size)
