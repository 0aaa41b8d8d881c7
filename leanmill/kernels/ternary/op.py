"""Ternary weights, trained straight-through."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from leanmill.kernels.dispatch import Code, choose, implementation
from leanmill.kernels.fake_quant.grid import check_float
from leanmill.kernels.sharded import is_dtensor, on_local_rows
from leanmill.kernels.ternary import cpu, naive
from leanmill.kernels.ternary.naive import Scale


Granularity = Literal["tensor", "row"]


def ternary(weight: Tensor, rule: Scale = "absmean", granularity: Granularity = "tensor") -> Tensor:
    """Snap a weight to {-s, 0, s}; the gradient passes unchanged (straight-through).

    `absmean`: s = mean |w|, clip(round(w / s), -1, 1) * s (BitNet b1.58, Ma et al. 2024,
    arXiv:2402.17764, eq. 1 to 3). `twn`: what exceeds 0.7 mean |w| is kept, s its mean (Li et al. 2016,
    arXiv:1605.04711, eq. 5 and 6). `mse`: s and threshold that minimise the squared error, by
    sorting. Sums are in fp64 (on a GPU in fp32 over at most 16,384 weights, then fp64), s is fp32
    and rounded to the weight's dtype once.

    Args:
        weight: fp32, bf16, fp16 or fp64 [..., out, in]. Of a DTensor s is that of the whole tensor.
        rule: How s and the threshold are chosen.
        granularity: One s a matrix [out, in] (each expert of a stacked weight has its own), or a row.

    Returns:
        Of the weight's shape and dtype.

    Raises:
        ValueError: A dtype or a name that does not fit, or a weight without dims.
    """
    _check(weight, rule, get_args(Scale), "rule")
    _check(weight, granularity, get_args(Granularity), "granularity")
    num_dims = _num_dims(weight, granularity)
    if not is_dtensor(weight):
        return _ternary(weight, rule, num_dims)
    if _is_whole(weight, num_dims):
        return on_local_rows(lambda local: _ternary(local, rule, num_dims), weight, num_row_dims=num_dims)
    return _OverShards.apply(weight, lambda w: naive.ternarise(w, rule, tuple(range(-num_dims, 0))))


def _check(weight: Tensor, value: str, allowed: tuple[str, ...], name: str) -> None:
    check_float(weight, "the weight")
    if weight.dim() == 0:
        raise ValueError("the weight has no dims; use a weight [..., out, in]")
    if value not in allowed:
        raise ValueError(f"{name} {value!r} is unknown; use one of {', '.join(allowed)}")


def _num_dims(weight: Tensor, granularity: Granularity) -> int:
    """Trailing dims that share a scale."""
    return min(weight.dim(), 2) if granularity == "tensor" else 1


def _is_whole(weight: Tensor, num_dims: int) -> bool:
    """Whether every rank of a DTensor holds all that shares a scale."""
    from torch.distributed.tensor import Shard

    placements: tuple[Any, ...] = weight.placements  # type: ignore[attr-defined]
    first = weight.dim() - num_dims
    return not any(p.is_partial() or (isinstance(p, Shard) and p.dim % weight.dim() >= first) for p in placements)


@torch.library.custom_op("leanmill::ternary", mutates_args=())
def _ternary(weight: Tensor, rule: str, num_dims: int) -> Tensor:
    weight = weight.contiguous()
    if not weight.numel():
        return weight.clone()  # without weights there is no mean, and nothing to snap
    code = choose("ternary", weight, c=cpu.library)
    if code is Code.TENSORS:
        return naive.ternarise(weight, rule, tuple(range(-num_dims, 0))).contiguous()  # type: ignore[arg-type]
    fast, length = implementation(__package__, code), weight.shape[-num_dims:].numel()
    # Triton launches on the current device.
    with torch.cuda.device_of(weight):
        level, divisor, threshold = _statistics(fast, weight, rule, length)
        return fast.ternary_levels(weight, length, level, divisor, threshold)  # type: ignore[no-any-return]


def _statistics(fast: ModuleType, weight: Tensor, rule: str, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Level, divisor and threshold of every run of `length` weights: what |w| / divisor exceeds becomes the level."""
    if rule == "mse":
        exact = weight.view(-1, length).to(torch.float32).abs()
        level, least = (t.flatten() for t in naive.least_squares(exact, (-1,)))
        # The kernels keep what exceeds the threshold; this rule keeps the threshold too.
        return level, torch.ones_like(level), torch.nextafter(least, least.new_full((), -1.0))
    mean = (fast.magnitude_sums(weight, length)[0] / length).to(torch.float32)
    if rule == "absmean":
        return mean, torch.where(mean == 0, 1.0, mean), torch.full_like(mean, 0.5)
    threshold = 0.7 * mean
    sums, counts = fast.magnitude_sums(weight, length, threshold)
    level = (sums / counts.clamp(min=1)).to(torch.float32)
    return level, torch.ones_like(level), threshold


def _fake(weight: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


_ternary.register_fake(_fake)
_ternary.register_autograd(lambda ctx, grad: (grad, None, None))


class _OverShards(torch.autograd.Function):
    """Tensor code on a DTensor whose scales span ranks: its means are those of the whole tensor."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, function: Any) -> Tensor:
        return function(weight)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None
