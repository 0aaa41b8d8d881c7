"""Large results: like those of torch in every respect but the pages below them."""

import pytest
import torch

from leanmill.kernels.native import large_pages
from leanmill.kernels.native.large_pages import large_empty


@pytest.mark.parametrize("shape", [(0,), (3, 5), (3000, 1000)])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_shape_dtype_and_memory_are_usable(shape, dtype):
    out = large_empty(torch.empty(2, dtype=torch.float64), *shape, dtype=dtype)
    assert out.shape == shape
    assert out.dtype == (dtype or torch.float64)
    assert out.is_contiguous()
    assert (out.fill_(3) == 3).all()


def test_only_whole_large_pages_inside_the_tensor_are_advised(monkeypatch):
    calls = []
    monkeypatch.setattr(large_pages, "_advise", lambda: lambda *arguments: calls.append(arguments))
    large_empty(torch.empty(1), 100)
    assert not calls
    out = large_empty(torch.empty(1), 2_000_000)
    ((first, length, _),) = calls
    assert first.value % 2**21 == length.value % 2**21 == 0
    assert out.data_ptr() <= first.value
    assert first.value + length.value <= out.data_ptr() + 8_000_000


def test_works_without_the_system_call(monkeypatch):
    monkeypatch.setattr(large_pages, "_advise", lambda: None)
    assert large_empty(torch.empty(1), 2_000_000).shape == (2_000_000,)
