"""Which code runs: C on the CPU, Triton on a GPU, tensor code for the rest; said once each."""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch
from torch import Tensor

from leanmill.kernels.fake_quant import cpu, naive
from leanmill.kernels.fake_quant.grid import Grid
from leanmill.kernels.native.dtypes import SUFFIXES


logger = logging.getLogger(__name__)


@functools.cache
def log_path(operation: str, path: str) -> None:
    """Say once a process which code an operation takes."""
    logger.info("%s runs as %s", operation, path)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def on_gpu(tensor: Tensor) -> bool:
    """Whether a Triton kernel covers this tensor."""
    return tensor.device.type == "cuda" and tensor.dtype in SUFFIXES and tensor.numel() > 0 and _has_triton()


def forward(
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    grid: Grid,
    num_kept: int = 0,
    group_size: int = 0,
    *,
    in_threads: bool = True,
) -> Tensor:
    """`naive.forward`, by the fastest code that covers the weight; see `gradients` for `in_threads`."""
    weight = weight.contiguous()
    if cpu.is_supported(weight, scale.numel(), group_size):
        log_path("fake_quant", "C")
        return cpu.forward(weight, scale, offset, grid, num_kept, group_size, in_threads=in_threads)
    if _is_for_triton(weight, scale, group_size):
        from leanmill.kernels.fake_quant import kernel

        log_path("fake_quant", "Triton")
        with torch.cuda.device(weight.device):
            return kernel.forward(weight, scale, offset, grid, num_kept, group_size)
    log_path("fake_quant", "tensor code")
    return naive.forward(weight, scale, offset, grid, num_kept, group_size).contiguous()


def gradients(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    grid: Grid,
    grad_scale: float,
    straight_through: bool = False,
    num_kept: int = 0,
    group_size: int = 0,
    decay: Tensor | None = None,
    needs_weight: bool = True,
    *,
    in_threads: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """`naive.gradients`, by the fastest code that covers the weight; the first may be left out.

    Between matmuls of small blocks `in_threads=False` is quicker on a CPU: torch's threads still
    spin after theirs, and ours would wait for the cores.
    """
    grad, weight = grad.to(weight.dtype).contiguous(), weight.contiguous()
    arguments = (grad, weight, scale, offset, grid, grad_scale, straight_through, num_kept, group_size, decay)
    if cpu.is_supported(weight, scale.numel(), group_size):
        return cpu.gradients(*arguments, needs_weight, in_threads=in_threads)
    if _is_for_triton(weight, scale, group_size):
        from leanmill.kernels.fake_quant import kernel

        with torch.cuda.device(weight.device):
            return kernel.gradients(*arguments, needs_weight)
    to_weight, to_scale, to_offset = naive.gradients(*arguments)
    return to_weight.contiguous() if needs_weight else None, to_scale, to_offset


def activations(tokens: Tensor, smallest: float, *, as_codes: bool) -> tuple[Tensor, Tensor]:
    """Codes (or values) of contiguous tokens and their steps, by the fastest code that covers them."""
    tokens = tokens.contiguous()
    if cpu.is_supported(tokens, tokens.shape[:-1].numel(), 0):
        log_path("quantise_activations", "C")
        return cpu.activations(tokens, smallest, as_codes=as_codes)
    if on_gpu(tokens):
        from leanmill.kernels.fake_quant import kernel

        log_path("quantise_activations", "Triton")
        with torch.cuda.device(tokens.device):
            return kernel.activations(tokens, smallest, as_codes=as_codes)
    log_path("quantise_activations", "tensor code")
    codes, steps = naive.activations(tokens, smallest)
    return (codes if as_codes else codes.to(steps.dtype).mul_(steps).to(tokens.dtype)), steps


def _is_for_triton(weight: Tensor, scale: Tensor, group_size: int) -> bool:
    fits = on_gpu(weight) and scale.numel() > 0
    return fits and (not group_size or weight.numel() // scale.numel() % group_size == 0)


def same_device(weight: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless all lie on the weight's device."""
    for name, other in others.items():
        if other is not None and other.device != weight.device:
            raise ValueError(
                f"{name} {tuple(other.shape)} is on {other.device}, the weight {tuple(weight.shape)} on "
                f"{weight.device}; call {name}.to(weight.device)"
            )


def scalar_like(value: float | Tensor | None, weight: Tensor) -> Tensor | None:
    """A (1,) tensor on the weight's device; a number in fp32 (fp64 for fp64). None for None and for a plain 0."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"decay has shape {tuple(value.shape)}; use a number or a tensor of one element")
        return value.reshape(1)
    if value is None or value == 0:
        return None
    exact = torch.promote_types(weight.dtype, torch.float32)
    return torch.full((1,), value, dtype=exact, device=weight.device)
