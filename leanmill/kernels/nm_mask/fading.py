"""N:M masks on the way in: pruned entries fade, and N and M change from step to step.

What changes is read by the operations out of a tensor on the CPU, so that compiled code stays valid and nothing waits
for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanmill.kernels.nm_mask.checks import check_decay, check_weight
from leanmill.kernels.nm_mask.op import path_of
from leanmill.kernels.sharded import on_local_rows


def nm_fade(
    weight: Tensor,
    masking: Tensor,
    *,
    decay: Tensor | None = None,
    spend_decay: bool = False,
    masks_gradient: bool = False,
    transposable: bool = False,
) -> Tensor:
    """Return W * (M + c (1 - M)), the weight with its pruned entries multiplied with c; M is the mask of `nm_mask`.

    The gradient is straight-through: g, the gradient of what is returned. With `masks_gradient` it is
    g * (M + c (1 - M)), what the chain rule gives for a mask that is a constant. With `decay`, decay * (1 - M) * W is
    added. All in fp32 (fp64 for fp64), rounded once; backward recomputes the mask from the weight.

    Args:
        weight: Floating [..., in]; may be a DTensor of whole rows.
        masking: fp64 [3] on the CPU: N, M and c. c of 1 leaves everything as it is, whatever N and M are, and c of 0
            is `nm_project`. Backward reads it anew, so it must not change between the two.
        decay: As `nm_project` has it.
        spend_decay: As `nm_project` has it.
        masks_gradient: See above.
        transposable: The mask is that of `nm_mask(..., transposable=True)`.

    Returns:
        [..., in] in the weight's dtype; kept entries bitwise as they were.

    Raises:
        ValueError: `masking`, `decay`, the weight or its shape is not one of these.
    """
    _check_masking(masking)
    if decay is not None:
        check_decay(decay, weight)
        decay = decay.detach()
    return on_local_rows(
        lambda local: _nm_fade(local, masking, decay, spend_decay, masks_gradient, transposable),
        weight,
        num_row_dims=1 + transposable,
    )


def _check_masking(masking: Tensor) -> None:
    if masking.shape != (3,) or masking.dtype != torch.float64 or masking.device.type != "cpu":
        raise ValueError(
            f"masking {list(masking.shape)} of {masking.dtype} on {masking.device} is no N, M and c; allowed: "
            f"torch.tensor([2.0, 4.0, 0.5], dtype=torch.float64) on the CPU"
        )


def _read(masking: Tensor, weight: Tensor, transposable: bool) -> tuple[int, int, float]:
    num_kept, group_size, left = masking.tolist()
    if left != 1:
        check_weight(weight, int(num_kept), int(group_size), transposable)
    return int(num_kept), int(group_size), left


def _scaled(tensor: Tensor, left: float) -> Tensor:
    exact = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.to(exact) * left


@torch.library.custom_op("leanmill::nm_fade", mutates_args=())
def _nm_fade(
    weight: Tensor,
    masking: Tensor,
    decay: Tensor | None,
    spend_decay: bool,
    masks_gradient: bool,
    transposable: bool,
) -> Tensor:
    num_kept, group_size, left = _read(masking, weight, transposable)
    if left == 1:
        return weight.clone(memory_format=torch.contiguous_format)
    if left == 0:
        return path_of("nm_project", weight).project(weight, num_kept, group_size, transposable)  # type: ignore[no-any-return]
    mask = path_of("nm_mask", weight).nm_mask(weight, num_kept, group_size, transposable)
    return torch.where(mask, weight, _scaled(weight, left).to(weight.dtype)).contiguous()


@_nm_fade.register_fake
def _(
    weight: Tensor,
    masking: Tensor,
    decay: Tensor | None,
    spend_decay: bool,
    masks_gradient: bool,
    transposable: bool,
) -> Tensor:
    return weight.new_empty(weight.shape)


@torch.library.custom_op("leanmill::nm_faded_grad", mutates_args=())
def _nm_faded_grad(
    grad: Tensor, weight: Tensor, masking: Tensor, decay: Tensor | None, masks_gradient: bool, transposable: bool
) -> Tensor:
    num_kept, group_size, left = _read(masking, weight, transposable)
    if left == 1:
        return grad.clone(memory_format=torch.contiguous_format)
    # A product also where c is 0: what is not finite stays so, and whoever looks at norms sees it.
    pruned = _scaled(grad, left if masks_gradient else 1.0)
    if decay is not None:
        pruned = pruned + decay.to(pruned.dtype) * weight.to(pruned.dtype)
    mask = path_of("nm_mask", weight).nm_mask(weight, num_kept, group_size, transposable)
    return torch.where(mask, grad, pruned.to(grad.dtype)).contiguous()


@_nm_faded_grad.register_fake
def _(
    grad: Tensor, weight: Tensor, masking: Tensor, decay: Tensor | None, masks_gradient: bool, transposable: bool
) -> Tensor:
    return weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, ctx.masking, ctx.decay, ctx.spends_decay, ctx.masks_gradient, ctx.transposable = inputs
    if ctx.decay is not None or ctx.masks_gradient:
        ctx.save_for_backward(weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
    if ctx.decay is not None or ctx.masks_gradient:
        # Neither masking nor decay is among the saved tensors: those must not change, and rules write these.
        (weight,) = ctx.saved_tensors
        grad = _nm_faded_grad(grad, weight, ctx.masking, ctx.decay, ctx.masks_gradient, ctx.transposable)
        if ctx.decay is not None and ctx.spends_decay:
            ctx.decay.zero_()
    return grad, None, None, None, None, None


_nm_fade.register_autograd(_backward, setup_context=_save)
