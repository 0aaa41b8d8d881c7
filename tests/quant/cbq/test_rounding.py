"""Low-rank rounding, the cut of outliers and the loss of a window, each written out in plain code."""

import math

import pytest
import torch
from pydantic import ValidationError

from leanmill.core.registry import parse_pass
from leanmill.kernels.fake_quant.grid import make_grid
from leanmill.quant.cbq.outliers import cut_off
from leanmill.quant.grids import UniformGrid
from leanmill.quant.rules import step_of_levels
from leanmill.quant.sharing import Sharing


def solver(**options):
    return parse_pass({"type": "cbq", "cut_outliers": False, **options}).solver(seed=3)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moved(layer):
    """Give a layer other values than those it starts from."""
    with torch.no_grad():
        layer.columns.copy_(drawn(*layer.columns.shape, seed=1))
        layer.log_change.copy_(0.1 * drawn(*layer.log_change.shape, seed=2))
    return layer


@pytest.mark.parametrize("rounding", ["hard", "soft"])
@pytest.mark.parametrize(("grid", "bits", "group_size"), [("symmetric", 2, 5), ("signed", 3, None), ("midrise", 1, 3)])
def test_values_and_gradients_are_those_of_the_formula(rounding, grid, bits, group_size):
    weight = drawn(7, 15)
    weight[2, 4] = weight[6] = 0
    options = {"grid": grid, "weight_bits": bits, "group_size": group_size, "rounding": rounding}
    layer = moved(solver(rank=2, **options).layer("a", weight))
    codes, size = make_grid(bits, grid), group_size or 15
    first = layer.first_step.repeat_interleave(size, 1)
    rows, columns, change = (p.detach().clone().requires_grad_() for p in (layer.rows, layer.columns, layer.log_change))
    units = (weight / first - codes.shift).clamp(codes.low, codes.high)
    logits = torch.log((units - units.floor() + 0.1) / (1.1 - (units - units.floor()))) + rows @ columns
    soft = (1.2 / (1 + torch.exp(-logits)) - 0.1).clamp(0, 1)
    share = soft if rounding == "soft" else soft + ((soft >= 0.5).float() - soft).detach()
    step = first * change.repeat_interleave(size, 1).exp()
    want = torch.where(weight == 0, 0.0, step * ((units.floor() + share).clamp(codes.low, codes.high) + codes.shift))
    got = layer.trained()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    upstream = drawn(7, 15, seed=5)
    got.backward(upstream)
    for ours, theirs in zip(
        (layer.rows, layer.columns, layer.log_change),
        torch.autograd.grad(want, (rows, columns, change), upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours.grad, theirs, rtol=1e-4, atol=1e-5)
    solved = layer.solved()
    assert not solved[weight == 0].any()
    levels = step.detach()[..., None] * (torch.arange(codes.low, codes.high + 1) + codes.shift)
    distance = (solved[..., None] - levels).abs().amin(-1)
    assert distance[weight != 0].max() < 1e-5


def test_it_begins_with_the_weight_and_with_the_nearest_codes():
    weight = drawn(6, 12)
    soft = solver(weight_bits=3, group_size=4, rounding="soft").layer("a", weight)
    limit = 3 * soft.first_step.repeat_interleave(4, 1)
    torch.testing.assert_close(soft.trained(), weight.clamp(-limit, limit), rtol=1e-5, atol=1e-6)
    nearest = parse_pass({"type": "rtn", "weight_bits": 3, "group_size": 4, "scale": "mse"}).solver()
    from leanmill.core.passes import InputStatistics

    statistics = InputStatistics(num_tokens=0, square_sum=torch.zeros(12), gram=None)
    torch.testing.assert_close(soft.solved(), nearest.prepare(statistics)(weight.clone()).weight)


def test_outliers_are_cut_at_the_widest_gap():
    weight = drawn(20, 11)
    assert torch.equal(cut_off(weight), weight)  # a normal distribution has none
    weight[3, 4], weight[0, 0], weight[7, 7] = 9.0, -8.5, 30.0
    flat = sorted(weight.abs().flatten().tolist())
    first, third = flat[55], flat[165]
    best, limit = 0.0, None
    for count in range(1, 220):
        inside = flat[:count]
        mean = sum(inside) / count
        score = (flat[count] - inside[-1]) ** 2 - sum((x - mean) ** 2 for x in inside) / count
        if flat[count] > third + 1.5 * (third - first) and score > best:
            best, limit = score, inside[-1]
    torch.testing.assert_close(cut_off(weight), weight.clamp(-limit, limit))
    assert limit == pytest.approx(9.0)  # the largest gap is below 30
    for odd in (torch.zeros(5, 5), torch.full((4, 4), 2.0), torch.ones(1, 2)):
        assert torch.equal(cut_off(odd), odd)


def test_loss_is_distance_and_divergence():
    found, wanted = drawn(2, 3, 5), drawn(2, 3, 5, seed=1)
    want = 0.0
    for ours, theirs in zip(found.view(-1, 5).tolist(), wanted.view(-1, 5).tolist(), strict=True):
        p, q = ([math.exp(x) / sum(map(math.exp, one)) for x in one] for one in (theirs, ours))
        want += sum((a - b) ** 2 for a, b in zip(ours, theirs, strict=True)) / 7
        want += 0.5 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert float(solver(divergence_weight=0.5).loss(found, wanted, 7.0)) == pytest.approx(float(want) / 6, rel=1e-5)


def test_soft_roundings_are_pulled_to_zero_or_one():
    layer = moved(solver(rounding="soft", group_size=None, rank=2).layer("a", drawn(3, 8)))
    one = solver(rounding="soft", pull_weight=0.1, group_size=None)
    assert one.pull([layer], 0.1) is None
    want = 0.1 * (1 - (2 * layer.shares() - 1).abs() ** 11).sum()  # half of the way from 20 to 2
    torch.testing.assert_close(one.pull([layer], 0.6), want)
    assert solver().pull([layer], 0.9) is None


@pytest.mark.parametrize(("grid", "bits"), [("symmetric", 3), ("signed", 4), ("midrise", 1), ("midrise", 2)])
def test_lsq_begins_with_the_levels_that_weights_have(grid, bits):
    weight = drawn(9, 24).bfloat16().float()
    written = moved(solver(grid=grid, weight_bits=bits, group_size=8).layer("a", weight)).solved().bfloat16().float()
    written[4] = 0
    sharing = Sharing("group", 8)
    step = step_of_levels(written, UniformGrid(bits, grid), sharing)
    torch.testing.assert_close(UniformGrid(bits, grid).rounded(written, step), written, rtol=8e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 1}, "set grid: midrise"),
        ({"overlap_blocks": 2}, "overlap_blocks to 1 or less"),
        ({"pull_weight": 1.0}, "type rounding: soft"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        parse_pass({"type": "cbq", **options})
