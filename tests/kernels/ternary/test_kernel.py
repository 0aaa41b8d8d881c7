"""The Triton kernels against the definition: interpreted without a GPU."""

import pytest
import torch

from leanmill.kernels.ternary.naive import ternarise
from tests.kernels.launcher import DEVICE, DTYPES, kernel_module


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 40), (1, 1), (5, 130), (1, 20_000)])
def test_kernels(shape, dtype, monkeypatch):
    kernel = kernel_module("ternary")
    weight = torch.randn(shape, device=DEVICE).to(dtype)
    length = shape[-1]
    monkeypatch.setattr(torch, "empty_like", lambda t, **k: torch.full_like(t, 777.0, **k))
    sums, counts = kernel.magnitude_sums(weight, length)
    exact = weight.double().abs()
    torch.testing.assert_close(sums, exact.sum(-1), rtol=1e-6, atol=0)
    assert (counts == length).all()
    mean = (sums / length).float()
    # The interpreter's stores cut bf16 off instead of rounding it.
    tolerance = {"rtol": 2**-7 if dtype == torch.bfloat16 else 1e-3 if dtype == torch.float16 else 1e-6, "atol": 0}
    got = kernel.ternary_levels(weight, length, mean, mean, torch.full_like(mean, 0.5))
    torch.testing.assert_close(got, ternarise(weight, "absmean", (-1,)), **tolerance)
    threshold = 0.7 * mean
    sums, counts = kernel.magnitude_sums(weight, length, threshold)
    is_kept = weight.float().abs() > threshold[:, None]
    assert torch.equal(counts, is_kept.sum(-1))
    torch.testing.assert_close(sums, (exact * is_kept).sum(-1), rtol=1e-6, atol=0)


def test_a_nan_shows():
    kernel = kernel_module("ternary")
    weight = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0], [2.0, 1.0]], device=DEVICE)
    sums, _ = kernel.magnitude_sums(weight, 2, torch.full((3,), 5.0, device=DEVICE))
    assert sums.isnan().tolist() == [True, False, False]
    level = torch.tensor([float("nan"), 1.0, 1.0], device=DEVICE)
    out = kernel.ternary_levels(weight, 2, level, torch.ones_like(level), torch.full_like(level, 1.5))
    assert out[0].isnan().all()
    assert out[1:].tolist() == [[1.0, 0.0], [1.0, 0.0]]
