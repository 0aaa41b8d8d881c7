"""The transforms in Triton."""

import pytest
import torch

from leanmill.kernels.hadamard import naive
from tests.kernels.launcher import DEVICE, DTYPES, kernel_module


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "block_size"), [((3, 32), 16), ((2, 3, 128), 128), ((1, 2), 2), ((5, 12), 4)])
def test_transform(shape, block_size, dtype):
    kernel = kernel_module("hadamard")
    x = torch.randn(shape, device=DEVICE).to(dtype)
    out = torch.full_like(x, float("nan"))
    kernel.hadamard(x, None, out, block_size)
    # The interpreter cuts bits off where a GPU rounds to bf16.
    rtol = {torch.float32: 0.0, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(out, naive.hadamard(x, block_size), rtol=rtol, atol=0)


def test_mask_and_place():
    kernel = kernel_module("hadamard")
    x = torch.randn(3, 64, device=DEVICE)
    mask = torch.rand(3, 64, device=DEVICE) > 0.5
    expected = naive.hadamard(x * mask, 32)
    kernel.hadamard(x, mask, x, 32)
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_levels", "length", "block_size"), [(2, 32, 32), (3, 96, 32), (16, 48, 16), (256, 64, 2)])
def test_quest(num_levels, length, block_size, dtype):
    kernel = kernel_module("hadamard")
    x = torch.randn(3, length, device=DEVICE).to(dtype)
    x[0] = 0
    found, expected = kernel.quest_quantise(x, num_levels, block_size), naive.quest_quantise(x, num_levels, block_size)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5 if dtype == torch.float32 else 0.01, atol=1e-6)
    assert torch.equal(found[1], expected[1])
