import pytest
import torch

from tests.kernels.compiled import assert_compiles
from tests.kernels.launcher import DEVICE, DTYPES, kernel_module


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "width", "first"), [(7, 5, 3), (5, 1030, 4), (4, 3, 4), (3, 2, 0), (0, 4, 0)])
def test_zeros_are_written_from_the_last_end_on_and_nowhere_else(dtype, num_rows, width, first):
    product = torch.full((num_rows, width), 7.0, dtype=dtype, device=DEVICE)
    ends = torch.tensor([0, min(1, first), first], device=DEVICE)
    kernel_module("grouped_gemm", "tail").zero_tail(product, ends)
    assert torch.all(product[:first] == 7.0)
    assert torch.all(product[first:] == 0.0)


@pytest.mark.slow
def test_the_kernel_compiles_for_a_gpu():
    pytest.importorskip("triton")
    types = {"out": "*bf16", "ends": "*i64", "num_rows": "i32", "num_experts": "i32", "width": "i32"}
    assert_compiles("leanmill.kernels.grouped_gemm.tail", "_zero_kernel", types, [{"NUM_PROGRAMS": 256, "BLOCK": 1024}])
