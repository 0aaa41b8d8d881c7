"""The Triton kernels against the definition: interpreted without a GPU."""

import pytest
import torch

from leanmill.kernels.fake_quant import naive
from leanmill.kernels.fake_quant.grid import make_grid, scale_shape
from tests.kernels.launcher import DEVICE, DTYPES, kernel_module


CASES = [
    # shape, scale, bits, grid, offset
    ((6, 40), (6, 1), 4, "signed", False),
    ((6, 40), (6, 5), 3, "unsigned", True),
    ((6, 40), (1, 1), 2, "midrise", True),
    ((3, 15), (3, 1), 2, "symmetric", False),
    ((2, 3, 16), (2, 1, 1), 8, "signed", False),
    ((2, 9000), (1, 1), 4, "signed", True),  # longer than a segment
]


def tolerances(dtype):
    """The interpreter's stores cut bf16 off instead of rounding it; a GPU may contract q * s + offset."""
    if DEVICE.type == "cuda":
        return {}
    return {"rtol": 2**-7 if dtype == torch.bfloat16 else 0, "atol": 0}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "like", "bits", "kind", "has_offset"), CASES)
def test_kernels(shape, like, bits, kind, has_offset, dtype, monkeypatch):
    kernel = kernel_module("fake_quant")
    weight = torch.randn(shape, device=DEVICE).to(dtype)
    weight.view(-1)[:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    grad = torch.randn(shape, device=DEVICE).to(dtype)
    scale = torch.rand(like, device=DEVICE) * 0.5 + 0.1
    offset = torch.randn(like, device=DEVICE) * 0.1 if has_offset else None
    grid = make_grid(bits, kind)
    assert scale_shape(weight, scale) == like
    # What a kernel does not write would stay at a value that no grid here holds.
    monkeypatch.setattr(torch, "empty_like", lambda t, **k: torch.full_like(t, 777.0, **k))
    out = kernel.forward(weight, scale, offset, grid)
    tolerance = tolerances(dtype)
    torch.testing.assert_close(out, naive.forward(weight, scale, offset, grid), equal_nan=True, **tolerance)
    for straight, needs in ((False, True), (True, True), (False, False)):
        got = kernel.gradients(grad, weight, scale, offset, grid, 0.5, straight, needs)
        expected = naive.gradients(grad, weight, scale, offset, grid, 0.5, straight)
        assert (got[0] is not None) == needs
        if needs:
            torch.testing.assert_close(got[0], expected[0], equal_nan=True, **tolerance)
        torch.testing.assert_close(got[1], expected[1], equal_nan=True, rtol=1e-4, atol=1e-4)
        if has_offset:
            torch.testing.assert_close(got[2], expected[2], equal_nan=True, rtol=1e-4, atol=1e-4)


def test_sums_repeat_bitwise():
    kernel = kernel_module("fake_quant")
    weight, grad = torch.randn(2, 4, 9000, device=DEVICE).unbind()
    scale = torch.full((1, 1), 0.3, device=DEVICE)
    arguments = (grad, weight, scale, None, make_grid(4, "signed"), 1.0, False, True)
    one, other = kernel.gradients(*arguments), kernel.gradients(*arguments)
    assert torch.equal(one[1], other[1])
    exact = naive.gradients(grad.double(), weight.double(), scale.double(), None, make_grid(4, "signed"), 1.0)[1]
    torch.testing.assert_close(one[1].double(), exact, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(dtype):
    kernel = kernel_module("fake_quant")
    for length in (1, 37, 5000):
        tokens = torch.randn(3, length, device=DEVICE).to(dtype)
        tokens[1] = 0
        tokens[2, 0] = float("nan")
        codes, steps = naive.activations(tokens, 1e-5)
        got, got_steps = kernel.activations(tokens, 1e-5, as_codes=True)
        assert torch.equal(got, codes)
        torch.testing.assert_close(got_steps, steps, rtol=0, atol=0, equal_nan=True)
        values, _ = kernel.activations(tokens, 1e-5, as_codes=False)
        torch.testing.assert_close(values, (codes * steps).to(dtype), equal_nan=True, **tolerances(dtype))
