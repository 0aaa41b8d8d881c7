"""Ternary levels against each paper's equations, and against exhaustive search."""

import pytest
import torch

from leanmill.kernels.ternary.naive import ternarise


WHOLE, ROWS = (-2, -1), (-1,)


def rows_of(weight, dims):
    """Every set of weights that shares a scale, as a list of flat fp64 vectors."""
    return list(weight.double().flatten(-len(dims)).reshape(-1, weight.flatten(-len(dims)).shape[-1]))


def absmean(w):
    # BitNet b1.58, eq. 1-3: gamma = mean |W|, RoundClip(W / gamma, -1, 1), times gamma.
    gamma = w.abs().mean()
    return (w / gamma).round().clamp(-1, 1) * gamma if gamma > 0 else torch.zeros_like(w)


def twn(w):
    # Li et al. 2016, eq. 4-6: delta = 0.7 mean |W|, alpha = mean of |W| above delta.
    delta = 0.7 * w.abs().mean()
    above = w.abs() > delta
    alpha = w.abs()[above].mean() if above.any() else torch.zeros(())
    return torch.where(above, w.sign() * alpha, torch.zeros_like(w))


def least_squares(w):
    # Every number of kept weights, largest first, with the best scale for it.
    order = w.abs().argsort(descending=True)
    best, best_error = torch.zeros_like(w), w.square().sum()
    for k in range(1, len(w) + 1):
        candidate = torch.zeros_like(w)
        kept = order[:k]
        candidate[kept] = w[kept].sign() * w[kept].abs().mean()
        error = (w - candidate).square().sum()
        if error < best_error - 1e-12:
            best, best_error = candidate, error
    return best


@pytest.mark.parametrize("dims", [WHOLE, ROWS])
@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 6), (1, 1), (1, 33)])
@pytest.mark.parametrize(("scale", "formula"), [("absmean", absmean), ("twn", twn), ("mse", least_squares)])
def test_equals_the_paper(scale, formula, shape, dims):
    weight = torch.randn(shape, dtype=torch.float64)
    got = rows_of(ternarise(weight, scale, dims), dims)
    expected = [formula(w) for w in rows_of(weight, dims)]
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", ["absmean", "twn", "mse"])
def test_low_precision_weights_use_fp32_statistics_and_exact_levels(scale, dtype):
    weight = (torch.randn(64, 96) * 0.02).to(dtype)
    got = ternarise(weight, scale, WHOLE)
    expected = ternarise(weight.double(), scale, WHOLE)
    assert got.dtype == dtype
    assert torch.equal(got.sign(), expected.sign().to(dtype))
    levels = got.unique()
    assert levels.numel() == 3
    assert torch.equal(levels, -levels.flip(0))
    torch.testing.assert_close(levels[2].double(), expected.max(), rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dims", [WHOLE, ROWS])
@pytest.mark.parametrize("scale", ["absmean", "twn", "mse"])
def test_zero_weights_stay_zero_and_finite(scale, dims):
    weight = torch.zeros(3, 4, 6)
    weight[1] = torch.randn(4, 6)
    weight[1, 2] = 0
    got = ternarise(weight, scale, dims)
    assert torch.isfinite(got).all()
    assert (got[[0, 2]] == 0).all()
    assert (got[1, 2] == 0).all()
    assert (got[1] != 0).any()


@pytest.mark.parametrize("scale", ["absmean", "twn", "mse"])
def test_a_constant_weight_keeps_its_value(scale):
    weight = torch.tensor([[0.25, -0.25, 0.25], [0.25, 0.25, -0.25]])
    assert torch.equal(ternarise(weight, scale, WHOLE), weight)


def test_zeros_of_a_mask_stay_zero():
    weight = torch.randn(8, 16) * (torch.arange(16) % 4 < 2)
    for scale in ("absmean", "twn", "mse"):
        assert (ternarise(weight, scale, WHOLE)[:, 2::4] == 0).all()
        assert (ternarise(weight, scale, ROWS)[:, 3::4] == 0).all()


def test_mse_is_the_best_of_the_three_on_gaussian_weights():
    weight = torch.randn(200, 500)
    errors = {s: (weight - ternarise(weight, s, WHOLE)).square().mean().item() for s in ("absmean", "twn", "mse")}
    assert errors["mse"] <= errors["twn"] <= errors["absmean"]
    assert errors["mse"] == pytest.approx(0.190, abs=0.005)
    assert errors["absmean"] == pytest.approx(0.263, abs=0.005)


def test_non_contiguous_weights():
    weight = torch.randn(6, 9).t()
    for scale in ("absmean", "twn", "mse"):
        assert torch.equal(ternarise(weight, scale, ROWS), ternarise(weight.contiguous(), scale, ROWS))
