"""SparseGPT on one layer, beside its algorithm written out with exact inverses, and beside the other criteria."""

import pytest
import torch

from leanmill.core.gram import Gram
from leanmill.core.passes import InputStatistics
from leanmill.core.registry import parse_pass


def calibration(num_in, *, seed=0):
    """Inputs whose features differ in size and are correlated."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(num_in, num_in, generator=generator) / num_in**0.5
    scale = torch.logspace(-1, 1, num_in)
    return torch.randn(8 * num_in, num_in, generator=generator) @ mix * scale


def statistics(x):
    return InputStatistics(num_tokens=len(x), square_sum=x.square().sum(0), gram=Gram.of(x.T @ x))


def written_out(weight, x, num_kept, group_size, damping):
    """Algorithm 1 of the paper for N:M, with the inverse of what is left of H at every column."""
    weight, hessian = weight.double().clone(), (x.T @ x).double()
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    keep = torch.ones_like(weight, dtype=torch.bool)
    for j in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[j:, j:])
        if j % group_size == 0:
            # The diagonal entry of a later column once those before it are gone.
            diagonal = torch.stack([torch.linalg.inv(hessian[j + k :, j + k :])[0, 0] for k in range(group_size)])
            score = weight[:, j : j + group_size].square() / diagonal
            kept = score.topk(num_kept, dim=1).indices
            keep[:, j : j + group_size] = torch.zeros_like(score, dtype=torch.bool).scatter_(1, kept, True)
        new = weight[:, j] * keep[:, j]
        weight[:, j:] -= ((weight[:, j] - new) / inverse[0, 0])[:, None] * inverse[0]
        weight[:, j] = new
    return weight


@pytest.mark.parametrize(("num_kept", "group_size"), [(2, 4), (1, 4), (4, 8)])
def test_equals_the_algorithm(num_kept, group_size):
    x, weight = calibration(24), torch.randn(5, 24)
    config = parse_pass({"type": "sparsegpt", "num_kept": num_kept, "group_size": group_size})
    got = config.solver().prepare(statistics(x))(weight.clone()).weight
    expected = written_out(weight, x, num_kept, group_size, 0.01)
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-4)
    assert ((got.reshape(-1, group_size) != 0).sum(1) == num_kept).all()


def test_loses_less_than_wanda_and_wanda_less_than_magnitude():
    x, weight = calibration(64), torch.randn(48, 64)
    losses = {}
    for kind in ("sparsegpt", "wanda", "magnitude"):
        pruned = (
            parse_pass({"type": kind, "num_kept": 2, "group_size": 4})
            .solver()
            .prepare(statistics(x))(weight.clone())
            .weight
        )
        losses[kind] = ((pruned - weight) @ x.T).square().sum().item()
    assert losses["sparsegpt"] < losses["wanda"] < losses["magnitude"]


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
def test_without_a_pattern_the_asked_for_number_goes(sparsity):
    x, weight = calibration(96), torch.randn(10, 96)
    config = parse_pass({"type": "sparsegpt", "sparsity": sparsity, "block_size": 32})
    got = config.solver().prepare(statistics(x))(weight.clone()).weight
    zeros = (got.reshape(10, 3, 32) == 0).sum((0, 2))
    assert (zeros == int(320 * sparsity)).all()


def test_a_feature_that_was_never_there_is_pruned():
    x, weight = calibration(16), torch.randn(3, 16)
    x[:, 5] = 0
    config = parse_pass({"type": "sparsegpt", "sparsity": 0.25})
    got = config.solver().prepare(statistics(x))(weight.clone()).weight
    assert (got[:, 5] == 0).all()
    assert torch.isfinite(got).all()
