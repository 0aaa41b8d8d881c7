"""GPTQ on one layer, beside its algorithm written out with exact inverses."""

import pytest
import torch

from leanmill.core.gram import Gram
from leanmill.core.passes import InputStatistics
from leanmill.core.registry import parse_pass


def calibration(num_in):
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(num_in, num_in, generator=generator) / num_in**0.5
    return torch.randn(8 * num_in, num_in, generator=generator) @ mix * torch.logspace(-0.5, 0.5, num_in)


def statistics(x):
    return InputStatistics(num_tokens=len(x), square_sum=x.square().sum(0), gram=Gram.of(x.T @ x))


def written_out(weight, x, bits, group_size, damping=0.01):
    weight, hessian = weight.double().clone(), (x.T @ x).double()
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    largest = 2 ** (bits - 1) - 1
    for j in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[j:, j:])
        if j % group_size == 0:
            scale = weight[:, j : j + group_size].abs().amax(1) / largest
        new = (weight[:, j] / scale).round().clamp(-largest, largest) * scale
        weight[:, j:] -= ((weight[:, j] - new) / inverse[0, 0])[:, None] * inverse[0]
        weight[:, j] = new
    return weight


@pytest.mark.parametrize("group_size", [8, 24])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_equals_the_algorithm(bits, group_size):
    x, weight = calibration(24), torch.randn(12, 24)
    raw = {"type": "gptq", "weight_bits": bits, "group_size": group_size, "order": "columns"}
    got = parse_pass(raw).solver().prepare(statistics(x))(weight.clone()).weight
    expected = written_out(weight, x, bits, group_size)
    # A value at the edge between two codes may fall to either side in fp32; its row then goes another way.
    same = (got.double() - expected).abs().amax(1) < 1e-3
    assert same.float().mean() > 0.8


@pytest.mark.parametrize("scale", ["absmax", "mse"])
@pytest.mark.parametrize("order", ["activations", "columns"])
def test_levels_and_a_smaller_loss_than_rounding(order, scale):
    x, weight = calibration(64), torch.randn(32, 64)
    raw = {"type": "gptq", "weight_bits": 3, "group_size": None, "order": order, "scale": scale}
    got = parse_pass(raw).solver().prepare(statistics(x))(weight.clone()).weight
    assert all(row.unique().numel() <= 7 for row in got)
    step = weight.abs().amax(1, keepdim=True) / 3
    rounded = (weight / step).round() * step
    assert ((got - weight) @ x.T).square().sum() < 0.9 * ((rounded - weight) @ x.T).square().sum()


def test_rows_of_zeros_stay():
    x, weight = calibration(8), torch.randn(4, 8)
    weight[1] = 0
    got = parse_pass({"type": "gptq", "group_size": 4}).solver().prepare(statistics(x))(weight.clone()).weight
    assert (got[1] == 0).all()
