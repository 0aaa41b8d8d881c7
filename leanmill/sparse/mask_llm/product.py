"""A weight times a soft mask, with the gradient of the kept weights' norm added once a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def masked(weight: Tensor, mask: Tensor, pull: Tensor) -> Tensor:
    """Return weight * mask; the mask's gradient is that of this and of -pull * ||weight * mask||^2.

    Args:
        weight: Floating [..., in].
        mask: At least fp32, of the same shape.
        pull: (1,), the factor. Backward reads it as it then is and sets it to 0, so that of all backward
            passes the first adds the second part; the weight gets none of it.

    Returns:
        [..., in] in the weight's dtype, rounded once.
    """
    return _masked(weight, mask, pull)  # type: ignore[no-any-return]


# An operator of its own, because a compiled graph must see the write to `pull` in backward.
@torch.library.custom_op("leanmill::mask_llm_masked", mutates_args=())
def _masked(weight: Tensor, mask: Tensor, pull: Tensor) -> Tensor:
    return (weight * mask).to(weight.dtype)


@_masked.register_fake
def _(weight: Tensor, mask: Tensor, pull: Tensor) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    weight, mask, ctx.pull = inputs
    ctx.save_for_backward(weight, mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    weight, mask = ctx.saved_tensors
    to_weight = (grad * mask).to(weight.dtype) if ctx.needs_input_grad[0] else None
    to_mask = None
    if ctx.needs_input_grad[1]:
        to_mask = (grad - 2 * ctx.pull * weight * mask) * weight
        ctx.pull.zero_()
    return to_weight, to_mask, None


_masked.register_autograd(_backward, setup_context=_save)
