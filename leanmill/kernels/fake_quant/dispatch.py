"""Which code runs: C on the CPU, Triton on a GPU, tensor code for the rest; said once each."""

from __future__ import annotations

import torch
from torch import Tensor

from leanmill.kernels.dispatch import Code, choose, implementation
from leanmill.kernels.fake_quant import cpu, naive
from leanmill.kernels.fake_quant.grid import Grid


_PACKAGE = __package__


def forward(
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    grid: Grid,
    *,
    in_threads: bool = True,
) -> Tensor:
    """`naive.forward`, by the fastest code that covers the weight; see `gradients` for `in_threads`."""
    weight = weight.contiguous()
    arguments = (weight, scale, offset, grid)
    code = _code(weight, scale)
    if code is Code.C:
        return cpu.forward(*arguments, in_threads=in_threads)
    with torch.cuda.device_of(weight):
        return implementation(_PACKAGE, code).forward(*arguments).contiguous()  # type: ignore[no-any-return]


def gradients(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    grid: Grid,
    grad_scale: float,
    straight_through: bool = False,
    needs_weight: bool = True,
    *,
    in_threads: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """`naive.gradients`, by the fastest code that covers the weight; the first may be left out.

    Between matmuls of small blocks `in_threads=False` is quicker on a CPU: torch's threads still
    spin after theirs, and ours would wait for the cores.
    """
    grad, weight = grad.to(weight.dtype).contiguous(), weight.contiguous()
    arguments = (grad, weight, scale, offset, grid, grad_scale, straight_through)
    code = _code(weight, scale)
    if code is Code.C:
        return cpu.gradients(*arguments, needs_weight, in_threads=in_threads)
    if code is Code.TRITON:
        from leanmill.kernels.fake_quant import kernel

        with torch.cuda.device(weight.device):
            return kernel.gradients(*arguments, needs_weight)
    to_weight, to_scale, to_offset = naive.gradients(*arguments)
    return to_weight.contiguous() if needs_weight else None, to_scale, to_offset


def activations(tokens: Tensor, smallest: float, *, as_codes: bool) -> tuple[Tensor, Tensor]:
    """Codes (or values) of contiguous tokens and their steps, by the fastest code that covers them."""
    tokens = tokens.contiguous()
    has_any = tokens.numel() > 0
    code = choose("quantise_activations", tokens, c=lambda: has_any and cpu.library(), triton=lambda: has_any)
    if code is not Code.TENSORS:
        with torch.cuda.device_of(tokens):
            return implementation(_PACKAGE, code).activations(tokens, smallest, as_codes=as_codes)  # type: ignore[no-any-return]
    codes, steps = naive.activations(tokens, smallest)
    return (codes if as_codes else codes.to(steps.dtype).mul_(steps).to(tokens.dtype)), steps


def _code(weight: Tensor, scale: Tensor) -> Code:
    has_any = weight.numel() > 0 and scale.numel() > 0
    return choose("fake_quant", weight, c=lambda: has_any and cpu.library(), triton=lambda: has_any)


def same_device(weight: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless all lie on the weight's device."""
    for name, other in others.items():
        if other is not None and other.device != weight.device:
            raise ValueError(
                f"{name} {tuple(other.shape)} is on {other.device}, the weight {tuple(weight.shape)} on "
                f"{weight.device}; call {name}.to(weight.device)"
            )
