"""One entry for the gate, differentiable, on every device."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from leanmill.kernels.dispatch import choose, implementation
from leanmill.kernels.sharded import TokenLayout, is_dtensor
from leanmill.kernels.swiglu import cpu


def swiglu(gate_up: Tensor) -> Tensor:
    """Return `silu(gate) * up` (Shazeer, 2020), computed in fp32 and rounded once.

    Args:
        gate_up: [..., 2I] fp32, bf16, fp16 or fp64; the last dim holds gate, then up. Kept for
            backward, which computes the sigmoid anew. A DTensor may be sharded over any dim but the last.

    Returns:
        [..., I].

    Raises:
        ValueError: The last dim is odd or sharded, or the dtype is not floating.
    """
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2 or not gate_up.is_floating_point():
        raise ValueError(f"gate_up is {gate_up.dtype} {tuple(gate_up.shape)}; it must be floating [..., 2I]")
    if is_dtensor(gate_up):
        layout = TokenLayout.of("gate_up", gate_up)
        return layout.spread(swiglu(layout.local("gate_up", gate_up)))
    width = gate_up.shape[-1]
    return _swiglu(gate_up.reshape(gate_up.numel() // max(width, 1), width)).reshape(*gate_up.shape[:-1], width // 2)


def path(gate_up: Tensor) -> ModuleType:
    """The module that computes for these tensors."""
    return implementation(__package__, choose("swiglu", gate_up, c=cpu.library))


@torch.library.custom_op("leanmill::swiglu", mutates_args=())
def _swiglu(gate_up: Tensor) -> Tensor:
    return path(gate_up).swiglu(gate_up.contiguous())  # type: ignore[no-any-return]


@_swiglu.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@torch.library.custom_op("leanmill::swiglu_backward", mutates_args=())
def _swiglu_backward(gate_up: Tensor, grad: Tensor) -> Tensor:
    return path(gate_up).backward(gate_up.contiguous(), grad.contiguous())  # type: ignore[no-any-return]


@_swiglu_backward.register_fake
def _(gate_up: Tensor, grad: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return _swiglu_backward(*ctx.saved_tensors, grad)


_swiglu.register_autograd(_backward, setup_context=_save)
