"""Packing in Triton."""

import pytest
import torch

from leanmill.kernels.packing import naive
from leanmill.kernels.packing.encoding import code_range, number_of
from tests.kernels.launcher import DEVICE, kernel_module


@pytest.mark.parametrize("encoding", [1, 2, 4, 8, "ternary"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 41), (2, 2, 300)])
def test_equals_the_definition(encoding, shape):
    kernel, number = kernel_module("packing"), number_of(encoding)
    lowest, largest = code_range(number)
    codes = torch.randint(lowest, largest + 1, shape, device=DEVICE)
    codes = codes.to(torch.int8 if encoding == "ternary" else torch.uint8)
    packed = kernel.pack(codes, number)
    assert torch.equal(packed, naive.pack(codes, number))
    assert torch.equal(kernel.unpack(packed, number, shape[-1]), codes)
