"""The gradient of coordinates, and what sees the gradient of the whole weight on its way."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor


_numbers = itertools.count()
_watchers: weakref.WeakValueDictionary[int, Watcher] = weakref.WeakValueDictionary()


class Watcher:
    """Adds up the gradients of one weight over the backward passes of a step.

    Args:
        sketch: [in, k] or [out, k] that the gradient, or its transpose, is multiplied with; None keeps it whole.
        is_left: Whether subspaces are of the weight's columns.
    """

    def __init__(self, sketch: Tensor | None, *, is_left: bool) -> None:
        self.sketch, self.is_left = sketch, is_left
        self.number = next(_numbers)
        self.total: Tensor | None = None
        """[..., out, in], or [..., out, k] or [..., in, k] with a sketch; None before the first."""
        _watchers[self.number] = self

    def see(self, gradient: Tensor) -> None:
        """Add the gradient of a backward pass [..., out, in]."""
        if self.sketch is not None:
            self.sketch = self.sketch.to(gradient.device)  # parameters may be kept in host memory
            gradient = (gradient if self.is_left else gradient.mT) @ self.sketch
        if self.total is None:
            self.total = gradient.clone()
        else:
            self.total += gradient


def in_subspace(matrix: Tensor, basis: Tensor, *, is_left: bool) -> Tensor:
    """Return the coordinates of a matrix [..., out, in]: basis^T M [..., rank, in], or M basis^T [..., out, rank]."""
    return basis.mT @ matrix if is_left else matrix @ basis.mT


# An operator of its own: compiled code need not know that somebody watches, and does not drop what it cannot see.
@torch.library.custom_op("leanmill::galore_gradient", mutates_args=())
def coordinates_gradient(gradient: Tensor, basis: Tensor, watcher: Tensor, is_left: bool) -> Tensor:
    """Return the gradient of coordinates, and show that of the weight to whoever watches.

    Args:
        gradient: [..., out, in]: of the weight.
        basis: [..., out, rank], or [..., rank, in].
        watcher: int64 (1,) on the CPU: number of a `Watcher`, -1 for none.
        is_left: Which of the two.
    """
    with torch.autocast(gradient.device.type, enabled=False):
        gradient = gradient.to(basis.dtype)
        found = _watchers.get(int(watcher))
        if found is not None:
            found.see(gradient)
        return in_subspace(gradient, basis, is_left=is_left).contiguous()


@coordinates_gradient.register_fake
def _(gradient: Tensor, basis: Tensor, watcher: Tensor, is_left: bool) -> Tensor:
    shape = (*gradient.shape[:-2], basis.shape[-1], gradient.shape[-1])
    return basis.new_empty(shape if is_left else (*gradient.shape[:-1], basis.shape[-2]))


class Moved(torch.autograd.Function):
    """A weight and what coordinates add to it; the gradient of these is watched."""

    @staticmethod
    def forward(
        ctx: Any, moved: Tensor, weight: Tensor, basis: Tensor, coordinates: Tensor, watcher: Tensor, is_left: bool
    ) -> Tensor:
        ctx.save_for_backward(basis)
        ctx.watcher, ctx.is_left, ctx.dtype = watcher, is_left, weight.dtype
        return moved.view_as(moved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (basis,) = ctx.saved_tensors
        to_weight = grad.to(ctx.dtype) if ctx.needs_input_grad[1] else None
        to_coordinates = None
        if ctx.needs_input_grad[3]:
            to_coordinates = coordinates_gradient(grad, basis, ctx.watcher, ctx.is_left)
        return None, to_weight, None, to_coordinates, None, None
