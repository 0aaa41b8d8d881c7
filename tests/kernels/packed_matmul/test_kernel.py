"""Packed matmuls in Triton."""

import pytest
import torch

from leanmill.kernels.packed_matmul import naive
from leanmill.kernels.packing.encoding import number_of
from leanmill.kernels.packing.op import pack
from tests.kernels.launcher import DEVICE, DTYPES, kernel_module


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize(("encoding", "num_groups"), [(2, 2), (4, 3), (8, 1), (1, 1), ("ternary", 1)])
def test_float(encoding, num_groups, num_tokens, dtype):
    kernel = kernel_module("packed_matmul")
    codes = torch.randint(-1, 2, (9, 48)) if encoding == "ternary" else torch.randint(0, 2**encoding, (9, 48))
    packed = pack(codes, encoding).to(DEVICE)
    scales = torch.rand(9, num_groups, device=DEVICE) / (100 if encoding == 8 else 1)
    zeros = torch.rand(9, num_groups, device=DEVICE)
    x = torch.randn(num_tokens, 48, device=DEVICE).to(dtype)
    found = kernel.packed_matmul(x, packed, scales, zeros, number_of(encoding))
    expected = naive.packed_matmul(x, packed, scales, zeros, number_of(encoding))
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * 5)


@pytest.mark.parametrize("num_tokens", [1, 6])
def test_ternary_int8(num_tokens):
    kernel = kernel_module("packed_matmul")
    codes = torch.randint(-1, 2, (11, 203))
    x = torch.randint(-128, 128, (num_tokens, 203)).to(torch.int8)
    found = kernel.ternary_int8_matmul(x.to(DEVICE), pack(codes, "ternary").to(DEVICE))
    assert torch.equal(found.cpu(), (x.long() @ codes.t()).int())
