"""Public entries: `prepack`, `prepacked_matmul`. 4 and 8 bit weights in the layout of torch's CPU kernels.

Torch multiplies bf16 with int4 (`_weight_int4pack_mm_for_cpu`) and int8 (`_weight_int8pack_mm`) weights laid
out its own way, so a weight is converted once and kept. Its kernels decode the weight anew for every 4
tokens: they win for few tokens, the paths of `cpu.py` for many.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from leanmill.kernels.dispatch import log_path
from leanmill.kernels.packed_matmul.op import DTYPES, MIDDLE, per_row
from leanmill.kernels.packing.encoding import codes_per_byte
from leanmill.kernels.packing.op import unpack
from leanmill.kernels.sharded import is_dtensor


MOST_TORCH_TOKENS = 16
"""More tokens than this run on this package's kernel."""
_GROUP_SIZES = (256, 128, 64, 32)
_OUT_MULTIPLE = {4: 16, 8: 4}
_IN_MULTIPLE = {4: 32, 8: 16}
"""For 8 bits torch checks neither and reads whole vectors of 16 codes, past the end of other rows."""
_MOST_CODES = 1 << 31
"""Torch's kernels compute offsets in 32 bits."""
_ALIGNMENT = 32
"""Bytes. Torch's int8 kernel reads with aligned instructions; without alignment they end the process."""


class PrepackedWeight(NamedTuple):
    """A weight in two layouts, of num_bits / 8 bytes a code each; what `prepack` returns.

    `layout` depends on the vector instructions of the processor: keep `packed` in checkpoints, not this.
    """

    num_bits: int
    layout: Tensor
    """uint8 [out, in / 2] as torch interleaves it, or int8 [out, in]."""
    layout_scales: Tensor
    """bf16 [groups, out, 2], scales and offsets, or bf16 [out]."""
    packed: Tensor
    """uint8 [out, in * num_bits / 8], as `packing.pack` returns it."""
    scales: Tensor
    """fp32 [out, groups], equal to those of the layout."""
    zero_points: Tensor
    """fp32 [out, groups], equal to those of the layout but for one fp32 rounding."""


def prepack(
    packed: Tensor, scales: Tensor, num_bits: int, *, zero_points: Tensor | float | None = None
) -> PrepackedWeight:
    """Convert W[o, i] = (code[o, i] - zero[o, g]) * scale[o, g] to the layout of torch's CPU kernels.

    Torch computes W = (code - 8) * s + t for 4 bits and W = (code - 128) * s for 8, with s = scale and
    t = (8 - zero) * scale, both in bf16. Scales are therefore rounded to bf16 here, then t: exact for bf16
    scales and zero points that lie 0 or a power of two from 8, otherwise within scale * 2^-8 * |8 - zero|.
    Every path of `prepacked_matmul` multiplies the weight so rounded.

    Args:
        packed: uint8 [out, in * num_bits / 8] on the CPU, what `packing.pack` returns; kept, not copied.
        scales: Floating [out, groups], [out] or one element. 4 bits: in / groups is a multiple of 32; torch
            knows groups of 32, 64, 128 and 256, larger ones are repeated. 8 bits: one group.
        num_bits: 4 (out a multiple of 16, in of 32) or 8 (out a multiple of 4, in of 16).
        zero_points: Like `scales`, or one number for all; None is 8 or 128. 8 bits: None or 128.

    Raises:
        ValueError: Shapes, dtypes, devices or zero points that torch's kernels do not take, or 2^31 codes and more.
    """
    _check_packed(packed, scales, num_bits)
    num_codes = packed.shape[1] * codes_per_byte(num_bits)
    rounded = per_row(scales, packed, num_codes, "scales").to(torch.bfloat16)
    if num_bits == 8:
        _check_symmetric(rounded, zero_points)
        layout = unpack(packed, 8, num_codes).bitwise_xor(128).view(torch.int8)
        kept = rounded.float().contiguous()
        return PrepackedWeight(8, layout, rounded.flatten().contiguous(), packed, kept, torch.full_like(kept, 128.0))
    repeats = _repeats(num_codes // rounded.shape[1], rounded)
    wide = rounded.float()
    if isinstance(zero_points, Tensor):
        zeros = per_row(zero_points, packed, num_codes, "zero_points").float().expand_as(wide)
    else:
        zeros = torch.full_like(wide, MIDDLE[4] if zero_points is None else float(zero_points))
    offsets = ((MIDDLE[4] - zeros) * wide).to(torch.bfloat16)
    # A group without a scale is zero whatever its zero point.
    kept_zeros = MIDDLE[4] - torch.where(wide == 0, 0.0, offsets.float() / wide)
    both = torch.stack([rounded, offsets], -1).repeat_interleave(repeats, 1).transpose(0, 1).contiguous()
    layout = torch._convert_weight_to_int4pack_for_cpu(unpack(packed, 4, num_codes).to(torch.int32), 1)
    return PrepackedWeight(4, layout, both, packed, wide.contiguous(), kept_zeros)


def prepacked_matmul(x: Tensor, weight: PrepackedWeight) -> Tensor:
    """Return x @ W^T for a weight from `prepack`; sums in fp32 (fp64 for fp64), not differentiable.

    bf16 with at most `MOST_TORCH_TOKENS` tokens runs on torch's kernel, all else as `packed_matmul` does:
    torch's kernels for fp32 and fp16 are not vectorised on every processor.

    Args:
        x: fp32, bf16, fp16 or fp64 [..., in] on the CPU.
        weight: What `prepack` returned.

    Returns:
        [..., out] in the dtype of `x`.

    Raises:
        ValueError: Another shape, dtype or device, or a DTensor.
    """
    num_codes = weight.packed.shape[1] * codes_per_byte(weight.num_bits)
    # For one token the dispatch of an operator of ours would take as long as torch's kernel.
    if type(x) is Tensor and x.dtype == torch.bfloat16 and x.dim() == 2 and not torch.compiler.is_compiling():
        is_plain = x.device.type == "cpu" and not (x.requires_grad and torch.is_grad_enabled())
        if is_plain and x.shape[1] == num_codes and 0 < x.shape[0] <= MOST_TORCH_TOKENS:
            return _by_torch(x, weight.layout, weight.layout_scales, weight.num_bits)
    if is_dtensor(x):
        raise ValueError("DTensors are not multiplied packed; gather them first: tensor.full_tensor()")
    if x.dtype not in DTYPES or x.dim() == 0 or x.shape[-1] != num_codes or x.device.type != "cpu":
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)} on {x.device}; this weight takes fp32, bf16, fp16 or fp64 "
            f"[..., {num_codes}] on the CPU; elsewhere use packed_matmul"
        )
    out = torch.ops.leanmill.prepacked_matmul(x.reshape(-1, num_codes), *weight[1:], weight.num_bits)
    return out.view(*x.shape[:-1], weight.packed.shape[0])


def runs_on_torch(dtype: torch.dtype, num_tokens: int) -> bool:
    """Return whether torch's kernel multiplies this many tokens."""
    return dtype == torch.bfloat16 and num_tokens <= MOST_TORCH_TOKENS


@torch.library.custom_op("leanmill::prepacked_matmul", mutates_args=())
def _prepacked_matmul(
    x: Tensor,
    layout: Tensor,
    layout_scales: Tensor,
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    num_bits: int,
) -> Tensor:
    if x.numel() == 0 or not runs_on_torch(x.dtype, x.shape[0]):
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return torch.ops.leanmill.packed_matmul(x, packed, scales.to(wide), zero_points.to(wide), num_bits)
    return _by_torch(x, layout, layout_scales, num_bits)


def _by_torch(x: Tensor, layout: Tensor, layout_scales: Tensor, num_bits: int) -> Tensor:
    log_path("prepacked_matmul", f"torch's int{num_bits} kernel")
    if num_bits == 8:
        return torch._weight_int8pack_mm(_aligned(x), _aligned(layout), layout_scales)
    group_size = x.shape[-1] // layout_scales.shape[0]
    return torch._weight_int4pack_mm_for_cpu(x.contiguous(), layout, group_size, layout_scales)


@_prepacked_matmul.register_fake
def _(
    x: Tensor,
    layout: Tensor,
    layout_scales: Tensor,
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    num_bits: int,
) -> Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]))


def _aligned(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def _check_packed(packed: Tensor, scales: Tensor, num_bits: int) -> None:
    if isinstance(num_bits, bool) or num_bits not in _OUT_MULTIPLE:
        raise ValueError(f"num_bits {num_bits!r} has no kernel in torch; allowed: 4 and 8; others use packed_matmul")
    if any(map(is_dtensor, (packed, scales))):
        raise ValueError("DTensors are not prepacked; gather them first: tensor.full_tensor()")
    if packed.dtype != torch.uint8 or packed.dim() != 2 or not scales.is_floating_point():
        raise ValueError(
            f"packed is {packed.dtype} {tuple(packed.shape)}, scales {scales.dtype}; allowed: uint8 [out, bytes] "
            f"from packing.pack and floating scales"
        )
    if packed.device.type != "cpu" or scales.device.type != "cpu":
        raise ValueError(f"packed is on {packed.device}, scales on {scales.device}; prepack on the CPU")
    num_rows, num_codes = packed.shape[0], packed.shape[1] * codes_per_byte(num_bits)
    fits = num_rows % _OUT_MULTIPLE[num_bits] == 0 and num_codes % _IN_MULTIPLE[num_bits] == 0
    if not fits or not 0 < num_rows * num_codes < _MOST_CODES:
        raise ValueError(
            f"a weight [{num_rows}, {num_codes}] of {num_bits} bits, packed {tuple(packed.shape)}, does not fit "
            f"torch's kernel; out must be a multiple of {_OUT_MULTIPLE[num_bits]}, in of {_IN_MULTIPLE[num_bits]}, "
            f"out * in between 1 and {_MOST_CODES - 1}; others use packed_matmul"
        )


def _check_symmetric(scales: Tensor, zero_points: Tensor | float | None) -> None:
    middle = MIDDLE[8]
    is_middle = zero_points is None or bool(torch.all(torch.as_tensor(zero_points) == middle))
    if scales.shape[1] != 1 or not is_middle:
        raise ValueError(
            f"8 bits with scales {tuple(scales.shape)} and zero_points {zero_points!r}; torch's kernel takes one scale "
            f"a row or in all and zero points of {middle}; others use packed_matmul"
        )


def _repeats(group_size: int, scales: Tensor) -> int:
    """Return how many of torch's groups make one of `group_size`."""
    for size in _GROUP_SIZES:
        if group_size % size == 0:
            return group_size // size
    raise ValueError(
        f"scales {tuple(scales.shape)} make groups of {group_size}; torch's int4 kernel takes multiples of 32; "
        f"others use packed_matmul"
    )
