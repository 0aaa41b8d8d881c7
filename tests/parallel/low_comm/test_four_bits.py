"""Outer gradients in 4 bits, against the formula: the nearest of 0 and +-2^k s, k = -6 ... 0."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from leanmill.parallel.low_comm.four_bits import BLOCK, decode, encode, num_bytes


def nearest(tensor: Tensor) -> Tensor:
    """The formula, by looking at every level."""
    found = []
    for block in tensor.flatten().double().split(BLOCK):
        scale = block.abs().max()
        levels = scale * torch.tensor([0.0, *(2.0**k for k in range(-6, 1))], dtype=torch.float64)
        distance = (block.abs()[:, None] - levels).abs()
        # A tie goes to the larger level, which comes last.
        index = levels.numel() - 1 - distance.flip(1).argmin(1)
        found.append(levels[index] * block.sign())
    return torch.cat(found)


@pytest.mark.parametrize("shape", [(1,), (256,), (3, 257), (40, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_are_the_nearest_levels(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = (torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator) ** 8).to(dtype)
    data = encode(tensor)
    assert data.dtype == torch.uint8
    assert data.numel() == num_bytes(tensor.numel())
    assert torch.equal(decode(data, tensor.numel()).double(), nearest(tensor.float()))


def test_levels_and_ties_are_exact() -> None:
    levels = torch.tensor([8.0, -4.0, 2.0, -1.0, 0.5, 0.25, -0.125, 0.0])
    assert torch.equal(decode(encode(levels), 8), levels)
    ties = torch.tensor([8.0, 6.0, -3.0, 0.0625, -0.0624, 5.99])
    assert decode(encode(ties), 6).tolist() == [8.0, 8.0, -4.0, 0.125, 0.0, 4.0]


def test_zeros_and_the_smallest_numbers_stay_finite() -> None:
    assert torch.equal(decode(encode(torch.zeros(5)), 5), torch.zeros(5))
    tiny = torch.full((4,), 1e-42)
    assert decode(encode(tiny), 4).isfinite().all()


def test_a_byte_is_two_elements() -> None:
    assert num_bytes(BLOCK) == 132
    assert encode(torch.empty(0)).numel() == 0
