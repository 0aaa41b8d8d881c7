"""The column recursion against optimal brain surgery written out."""

import pytest
import torch

from leanmill.core import gram as gram_module
from leanmill.core.gram import Gram
from leanmill.core.obs import inverse_factor, solve_columns


def surgery(weight, hessian, values):
    """Fix columns from the left; each error is made up for by the exact inverse of what is left of H."""
    weight = weight.clone()
    num_in = weight.shape[1]
    for j in range(num_in):
        inverse = torch.linalg.inv(hessian[j:, j:])
        error = (weight[:, j] - values(weight, j)) / inverse[0, 0]
        weight[:, j:] -= error[:, None] * inverse[0]
        weight[:, j] = values.last
    return weight


class Round:
    def __init__(self):
        self.last = None

    def __call__(self, weight, j):
        self.last = weight[:, j].mul(4).round().div(4)
        return self.last


class Rule:
    groups = 0

    def start_group(self, columns, diagonal):
        self.groups += 1
        assert columns.shape[1] == diagonal.numel()

    def value(self, column, index):
        return column.mul(4).round().div(4)


@pytest.mark.parametrize(("num_in", "group_size"), [(12, 4), (300, 100), (300, 7), (300, 300), (130, 130), (5, 64)])
def test_columns_equal_optimal_brain_surgery(num_in, group_size, monkeypatch):
    monkeypatch.setattr(gram_module, "TILE", 64)
    torch.manual_seed(0)
    x = torch.randn(4 * num_in, num_in, dtype=torch.float64) @ torch.randn(num_in, num_in, dtype=torch.float64)
    gram = x.T @ x
    weight = torch.randn(3, num_in, dtype=torch.float64)
    hessian = gram + 0.01 * gram.diagonal().mean() * torch.eye(num_in, dtype=torch.float64)
    rule = Rule()
    got, error = solve_columns(weight, inverse_factor(Gram.of(gram), 0.01), rule, group_size=group_size)
    assert rule.groups == -(-num_in // group_size)
    expected = surgery(weight, hessian, Round())
    # A column at a rounding edge may fall to either side; everything after it then differs.
    same = (got - expected).abs().amax(1) < 1e-6
    assert same.float().mean() >= 2 / 3
    assert error == pytest.approx(((got - weight) @ x.T).square().sum().item(), rel=1e-6)
    loss = lambda w: ((w - weight) @ hessian * (w - weight)).sum()  # noqa: E731
    assert num_in < 100 or loss(got) < loss(weight.mul(4).round().div(4))


def test_features_that_were_always_zero_are_left_to_themselves():
    x = torch.randn(50, 6)
    x[:, 2] = 0
    factor = inverse_factor(Gram.of(x.T @ x), 0.01).rows(0, 6, torch.float32)
    assert torch.isfinite(factor).all()
    assert factor[2, 3:].abs().max() < 1e-6


def test_degenerate_inputs_say_what_to_type():
    x = torch.randn(1, 40).double().repeat(3, 1) * 1e3
    with pytest.raises(ValueError, match="set damping"):
        inverse_factor(Gram.of((x.T @ x) - 1e3 * torch.eye(40).double()), 1e-12)


@pytest.mark.parametrize("size", [1, 64, 150])
def test_the_factor_is_that_of_the_inverse(size, monkeypatch):
    monkeypatch.setattr(gram_module, "TILE", 64)
    torch.manual_seed(1)
    x = torch.randn(2 * size, size, dtype=torch.float64) * torch.logspace(-3, 3, size, dtype=torch.float64)
    hessian = x.T @ x
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    expected = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    factor = inverse_factor(Gram.of(x.T @ x), 0.01)
    torch.testing.assert_close(factor.rows(0, size, torch.float64), expected, rtol=1e-6, atol=1e-12)
    part = factor.rows(size // 3, size // 2 + 1, torch.float64)
    torch.testing.assert_close(part, expected[size // 3 : size // 2 + 1, size // 3 :], rtol=1e-6, atol=1e-12)
