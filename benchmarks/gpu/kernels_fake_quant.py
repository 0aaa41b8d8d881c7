"""Fake quantisation, ternary weights and activations against copy bandwidth; L4Q's layer against a composition."""

from __future__ import annotations

from collections.abc import Callable

import torch
from kernel_case import GpuCase
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leanmill.kernels.fake_quant.activations import int8_activations, quantise_activations
from leanmill.kernels.fake_quant.op import fake_quant, initial_scale
from leanmill.kernels.lowrank_delta import naive
from leanmill.kernels.lowrank_delta.op import lowrank_delta, lowrank_delta_linear
from leanmill.kernels.ternary.op import ternary


LEAST_SHARE = 0.85


def cases(device: torch.device, size: int = 8192, tokens: int = 8192) -> list[GpuCase]:
    """The figures of this group; smaller sizes let a test build and run them anywhere."""
    weight = (torch.randn(size, size, device=device) * 0.02).bfloat16()
    found = [*grid_cases(weight), *level_cases(weight)]
    return [*found, *low_rank_cases(weight, tokens)]


def bandwidth_case(name: str, run: Callable[[], object], num_bytes: int) -> GpuCase:
    """A kernel that should move its bytes as fast as a copy."""
    return GpuCase(name, run, num_bytes=num_bytes, least_bandwidth_share=LEAST_SHARE)


def grid_cases(weight: Tensor) -> list[GpuCase]:
    """LSQ with each granularity, forward and backward apart."""
    size, num_bytes = weight.shape[0], weight.numel() * weight.element_size()
    grad = torch.randn_like(weight)
    found = []
    for what, shape in (("tensor", (1, 1)), ("row", (size, 1)), ("group of 128", (size, size // 128))):
        scale = initial_scale(weight, shape, num_bits=4)

        def forward(scale: Tensor = scale) -> Tensor:
            return fake_quant(weight, scale, num_bits=4)

        def backward(scale: Tensor = scale) -> object:
            settings = (4, "signed", False, None, True)
            return torch.ops.leanmill.fake_quant_backward(grad, weight, scale, None, *settings)

        found.append(bandwidth_case(f"fake_quant int4 a {what}, forward", forward, 2 * num_bytes))
        found.append(bandwidth_case(f"fake_quant int4 a {what}, backward", backward, 3 * num_bytes))
    return found


def level_cases(weight: Tensor) -> list[GpuCase]:
    """Levels need a statistic first, so the weight is read twice; activations fit in a program."""
    num_bytes = weight.numel() * weight.element_size()
    return [
        bandwidth_case("ternary absmean", lambda: ternary(weight), 3 * num_bytes),
        bandwidth_case("ternary twn a row", lambda: ternary(weight, "twn", "row"), 4 * num_bytes),
        bandwidth_case("quantise_activations", lambda: quantise_activations(weight), 2 * num_bytes),
        bandwidth_case("int8_activations", lambda: int8_activations(weight), num_bytes + num_bytes // 2),
    ]


def low_rank_cases(weight: Tensor, tokens: int) -> list[GpuCase]:
    """L4Q: merge and round in one go, and its linear layer, against the same in separate steps."""
    size, rank = weight.shape[0], 16
    a = torch.randn(rank, size, device=weight.device).mul_(size**-0.5).requires_grad_()
    b = torch.zeros(size, rank, device=weight.device).requires_grad_()
    scale = initial_scale(weight, (size, 1), num_bits=4).requires_grad_()
    x = torch.randn(tokens, size, device=weight.device).to(weight.dtype).requires_grad_()
    grad = torch.randn_like(x)

    def ours() -> object:
        out = lowrank_delta_linear(x, weight, a, b, 1.0, scale=scale, num_bits=4)
        return torch.autograd.grad(out, (x, a, b, scale), grad)

    def composed() -> object:
        staged = fake_quant(naive.lowrank_delta(weight, a, b, 1.0), scale, num_bits=4)
        return torch.autograd.grad(F.linear(x, staged), (x, a, b, scale), grad)

    merge = GpuCase(
        "lowrank_delta int4 a row, rank 16, forward",
        lambda: lowrank_delta(weight, a, b, 1.0, scale=scale, num_bits=4),
        num_bytes=2 * weight.numel() * weight.element_size(),
        peer=lambda: fake_quant(naive.lowrank_delta(weight, a, b, 1.0), scale, num_bits=4),
        peer_name="merge, then fake_quant",
    )
    linear = GpuCase(
        f"lowrank_delta_linear int4 a row, rank 16, {tokens} tokens, forward and backward",
        ours,
        num_flops=3 * 2 * tokens * size * size,
        peer=composed,
        peer_name="merge, fake_quant, linear",
        most_time_over_peer=1.1,
    )
    return [merge, linear]
