"""Triton kernels against the definitions: compiled on a GPU, interpreted elsewhere."""

import pytest
import torch

from leanmill.kernels.nm_mask import naive
from tests.kernels.launcher import DEVICE, DTYPES, kernel_module
from tests.kernels.nm_mask.test_naive import SPECIAL


kernel = kernel_module("nm_mask")
# Both kernels, one block and several, powers of two and not.
CASES = [(1, 2, 5), (2, 4, 3), (3, 4, 700), (2, 3, 300), (3, 8, 130), (5, 12, 2), (4, 16, 70), (31, 64, 18)]


def drawn(shape, dtype, kind):
    if kind == "ties":
        return (torch.randint(-3, 4, shape) * 0.5).to(DEVICE, dtype)
    if kind == "special":
        return torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape)].to(DEVICE, dtype)
    return torch.randn(shape).to(DEVICE, dtype)


def same(got, expected):
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def same_but_for_rounding(got, expected):
    """The interpreter cuts fp32 off to bf16 where a GPU rounds to nearest."""
    if DEVICE.type == "cpu" and got.dtype == torch.bfloat16:
        torch.testing.assert_close(got, expected, rtol=torch.finfo(got.dtype).eps, atol=0, equal_nan=True)
    else:
        same(got, expected)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Outputs start as NaN and 7, so that an entry left unwritten shows."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poison(out):
        return out.fill_(float("nan")) if out.is_floating_point() else out.view(torch.uint8).fill_(7).view(out.dtype)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: poison(new_empty(*args, **kwargs)))


@pytest.mark.parametrize("kind", ["normal", "ties", "special"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_kept", "group_size", "num_groups"), CASES)
def test_groups(num_kept, group_size, num_groups, dtype, kind):
    weight, grad = (drawn((2, num_groups * group_size), dtype, kind) for _ in range(2))
    pattern = (num_kept, group_size, False)
    mask = kernel.nm_mask(weight, *pattern)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, naive.nm_mask_by_sort(weight, num_kept, group_size))
    same(kernel.project(weight, *pattern), naive.project(weight, *pattern))
    decay = torch.tensor([0.3], device=DEVICE)
    got = kernel.decayed_grad(grad, weight, decay, *pattern)
    same_but_for_rounding(got, naive.decayed_grad(grad, weight, decay, *pattern))


@pytest.mark.parametrize("kind", ["normal", "ties", "special"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 4), (2, 8, 20), (4, 1032)])
def test_tiles(shape, dtype, kind):
    weight, grad = (drawn(shape, dtype, kind) for _ in range(2))
    assert torch.equal(kernel.nm_mask(weight, 2, 4, True), naive.tile_mask(weight))
    same(kernel.project(weight, 2, 4, True), naive.project(weight, 2, 4, True))
    decay = torch.tensor([0.3], device=DEVICE)
    got = kernel.decayed_grad(grad, weight, decay, 2, 4, True)
    same_but_for_rounding(got, naive.decayed_grad(grad, weight, decay, 2, 4, True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_kept", "group_size", "num_groups"), CASES)
def test_compressed_form(num_kept, group_size, num_groups, dtype):
    weight = drawn((3, num_groups * group_size), dtype, "normal")
    values, indices = kernel.compress(weight, num_kept, group_size)
    expected = naive.compress(weight, num_kept, group_size)
    same(values, expected[0])
    same(indices, expected[1])
    same(kernel.expand(values, indices, num_kept, group_size), naive.project(weight, num_kept, group_size, False))


def test_other_strides_and_no_elements():
    weight = torch.randn(16, 12, device=DEVICE)
    same(kernel.project(weight.t(), 2, 4, False), naive.project(weight.t(), 2, 4, False))
    same(kernel.project(weight.t(), 2, 4, True), naive.project(weight.t(), 2, 4, True))
    same(kernel.compress(weight.t(), 2, 4)[0], naive.compress(weight.t(), 2, 4)[0])
    for shape in ((0, 8), (8, 0)):
        empty = torch.empty(shape, device=DEVICE)
        assert kernel.project(empty, 2, 4, False).shape == kernel.nm_mask(empty, 2, 4, True).shape == shape
        assert kernel.expand(*kernel.compress(empty, 2, 4), 2, 4).shape == shape
