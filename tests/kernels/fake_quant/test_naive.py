"""The definition against the papers' formulas, an element at a time, and against autograd."""

import math

import pytest
import torch

from leanmill.kernels.fake_quant import naive
from leanmill.kernels.fake_quant.grid import SMALLEST_SCALE, make_grid, scale_shape
from leanmill.kernels.fake_quant.op import initial_scale


GRIDS = [(2, "signed"), (4, "signed"), (8, "signed"), (2, "symmetric"), (1, "unsigned"), (3, "unsigned")]
GRIDS += [(1, "midrise"), (2, "midrise"), (4, "midrise"), (2, "stretched"), (3, "stretched")]
LEVELS = {
    (2, "signed"): [-2, -1, 0, 1],
    (3, "symmetric"): [-3, -2, -1, 0, 1, 2, 3],
    (2, "stretched"): [-1, 0, 1],
    (2, "unsigned"): [0, 1, 2, 3],
    (1, "midrise"): [-0.5, 0.5],
    (2, "midrise"): [-1.5, -0.5, 0.5, 1.5],
}


@pytest.mark.parametrize(("bits", "kind"), LEVELS)
def test_a_grid_has_its_levels_and_every_value_takes_the_nearest(bits, kind):
    levels = torch.tensor(LEVELS[bits, kind], dtype=torch.float64) * 0.3
    weight = torch.linspace(-2, 2, 1001, dtype=torch.float64).view(1, -1) + 1e-7
    got = naive.forward(weight, torch.full((1, 1), 0.3, dtype=torch.float64), None, make_grid(bits, kind))
    nearest = levels[(weight.view(-1, 1) - levels).abs().argmin(-1)].view(1, -1)
    torch.testing.assert_close(got, nearest, rtol=1e-12, atol=1e-12)
    assert got.unique().numel() == len(levels)


def lsq_element(v, s, grid):
    """Esser et al. eq. 1-3 (Qn = -low, Qp = high) for one number, gradients for an upstream of 1."""
    u = v / s
    if u <= grid.low:
        return grid.low * s, float(u == grid.low), float(grid.low) if u < grid.low else 0.0
    if u >= grid.high:
        return grid.high * s, float(u == grid.high), float(grid.high) if u > grid.high else 0.0
    return round(u) * s, 1.0, round(u) - u


@pytest.mark.parametrize(("bits", "kind"), [(2, "signed"), (4, "signed"), (3, "unsigned"), (4, "symmetric")])
def test_equals_lsq(bits, kind):
    grid = make_grid(bits, kind)
    weight = torch.randn(1, 200, dtype=torch.float64)
    weight[0, :6] = torch.tensor([grid.low, grid.high, 0.5, -0.5, 1.5, 0.0]) * 0.25  # edges and ties, exactly
    scale = torch.full((1, 1), 0.25, dtype=torch.float64)
    grad = torch.randn_like(weight)
    expected = [lsq_element(v, 0.25, grid) for v in weight[0].tolist()]
    out = naive.forward(weight, scale, None, grid)
    to_weight, to_scale, none = naive.gradients(grad, weight, scale, None, grid, 0.125)
    torch.testing.assert_close(out[0], torch.tensor([e[0] for e in expected], dtype=torch.float64))
    torch.testing.assert_close(to_weight[0], grad[0] * torch.tensor([e[1] for e in expected], dtype=torch.float64))
    total = sum(g * e[2] for g, e in zip(grad[0].tolist(), expected, strict=True))
    assert to_scale.item() == pytest.approx(0.125 * total, rel=1e-12)
    assert none is None


def straight_through_round(x):
    return x + (x.round() - x).detach()


@pytest.mark.parametrize("scale_like", [(1,), (1, 1), (6, 1), (6, 3)])
@pytest.mark.parametrize("has_offset", [False, True])
@pytest.mark.parametrize(("bits", "kind"), GRIDS)
def test_gradients_are_those_of_autograd_with_rounding_passed_through(bits, kind, has_offset, scale_like):
    # LSQ and LSQ+ are defined as just that: round passes its gradient, clip does not outside.
    grid = make_grid(bits, kind)
    weight = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
    scale = (torch.rand(scale_like, dtype=torch.float64) * 0.5 + 0.3).requires_grad_()
    offset = torch.randn(scale_like, dtype=torch.float64).mul(0.2).requires_grad_() if has_offset else None
    grad = torch.randn_like(weight)
    shape = scale_shape(weight, scale)
    groups = weight.unflatten(-1, (shape[-1], -1))
    s = scale.view(shape).unsqueeze(-1)
    b = offset.view(shape).unsqueeze(-1) if has_offset else torch.zeros(())
    u = (groups - b) / s
    low, high = grid.edges
    clipped = u.clamp(low, high)
    codes = straight_through_round(clipped - grid.shift).clamp(grid.low, grid.high) + grid.shift
    if kind in ("midrise", "stretched"):
        # Past the outermost code but inside of the edges, rounding still passes the gradient.
        shift = grid.shift
        codes = clipped + ((clipped - shift).round().clamp(grid.low, grid.high) + shift - clipped).detach()
        codes = torch.where((u < low) | (u > high), u.sign() * (grid.high + shift), codes)
    (codes * s + b).flatten(-2).backward(grad)
    with torch.no_grad():
        arguments = weight, scale.view(shape), None if offset is None else offset.view(shape), grid
        torch.testing.assert_close(naive.forward(*arguments), (codes * s + b).flatten(-2).detach())
        to_weight, to_scale, to_offset = naive.gradients(grad, *arguments, 1.0)
    torch.testing.assert_close(to_weight, weight.grad)
    torch.testing.assert_close(to_scale.view(scale_like), scale.grad)
    if has_offset:
        torch.testing.assert_close(to_offset.view(scale_like), offset.grad)


def test_scale_gradient_is_the_slope_of_the_error_between_jumps():
    # Without the rounding's jumps, which a difference quotient also leaves out, d/ds of q * s is q.
    weight, scale = torch.randn(1, 50, dtype=torch.float64) * 20, torch.full((1, 1), 0.3, dtype=torch.float64)
    grid = make_grid(3, "signed")
    outside = ((weight / scale < grid.low) | (weight / scale > grid.high)).double()
    _, to_scale, _ = naive.gradients(outside, weight, scale, None, grid, 1.0)
    step = 1e-6
    difference = naive.forward(weight, scale + step, None, grid) - naive.forward(weight, scale - step, None, grid)
    assert to_scale.item() == pytest.approx(((difference / (2 * step)) * outside).sum().item(), rel=1e-6)


def test_scales_that_fall_to_zero_do_no_harm():
    for value in (0.0, -1.0):
        scale = torch.full((1, 1), value)
        weight = torch.tensor([[0.0, 1.0, -1.0]])
        out = naive.forward(weight, scale, None, make_grid(4, "signed"))
        assert torch.equal(out, torch.tensor([[0.0, 7.0, -8.0]]) * SMALLEST_SCALE)
        grads = naive.gradients(torch.ones(1, 3), weight, scale, None, make_grid(4, "signed"), 1.0)
        assert grads[1].item() == -1.0
        assert torch.isfinite(grads[0]).all()


def test_initial_scale_is_that_of_lsq():
    weight = torch.randn(4, 8)
    assert initial_scale(weight, (1,), num_bits=4).item() == pytest.approx(2 * weight.abs().mean() / math.sqrt(7))
    per_group = initial_scale(weight, (4, 2), num_bits=2, grid="unsigned")
    torch.testing.assert_close(per_group, 2 * weight.view(4, 2, 4).abs().mean(-1) / math.sqrt(3))
    assert initial_scale(weight.bfloat16(), (4, 1), num_bits=3).dtype == torch.float32


def test_activations_are_bitnets():
    tokens = torch.randn(5, 33)
    codes, steps = naive.activations(tokens, 1e-5)
    factor = torch.tensor(127.0) / tokens.abs().amax(-1, keepdim=True).clamp(min=1e-5)  # the paper's listing
    expected = (tokens * factor).round().clamp(-128, 127)
    assert torch.equal(codes.float(), expected)
    torch.testing.assert_close(codes * steps, expected / factor)
    assert (codes.abs().amax(-1) == 127).all()
