"""ParetoQ against its formulas, written out as in its code, values and gradients."""

import pytest
import torch

from leanmill.core.registry import parse_technique
from leanmill.core.sites import iter_sites
from leanmill.models.materialise import initialise_stages
from leanmill.quant.paretoq.stage import make_stage
from leanmill.trainer.prepare import undecayed
from tests.core.tiny import install, loss_of, tiny, tokens


def elastic_binarisation(w, alpha):
    """alpha sign(w); g inside of [-alpha, alpha]; sign(w) g."""
    return w.sign() * alpha, w.abs() <= alpha, w.sign()


def stretched(w, alpha, num_levels, shift):
    """(round(clip(w / alpha) n - shift) + shift) / n alpha, the edges at alpha where the code has 0.99 alpha."""
    u, largest = w / alpha, (num_levels - shift) / num_levels if shift else 1 / num_levels
    inside = u.abs() <= 1
    code = (torch.round(u.clamp(-0.99, 0.99) * num_levels - shift) + shift) / num_levels
    return code * alpha, inside, torch.where(inside, code - u, u.sign() * largest)


def lsq(w, alpha, num_bits):
    low, high = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
    u = w / alpha
    inside = (u >= low) & (u <= high)
    code = u.clamp(low, high).round()
    return code * alpha, inside, torch.where(inside, code - u, code)


PAPER = {
    1: lambda w, a: elastic_binarisation(w, a),
    1.58: lambda w, a: stretched(w, a, 1.5, 0),
    2: lambda w, a: stretched(w, a, 2, 0.5),
    3: lambda w, a: lsq(w, a, 3),
    4: lambda w, a: lsq(w, a, 4),
}
LARGEST_CODE = {1: 1, 1.58: 1, 2: 1, 3: 3, 4: 7}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 12), (3, 5, 4)])
@pytest.mark.parametrize("num_bits", PAPER)
def test_value_and_gradients_are_the_papers(num_bits, shape, dtype):
    torch.manual_seed(0)
    weight, upstream = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)
    stage = make_stage(weight, num_bits)
    with torch.no_grad():
        stage.scale.copy_(torch.rand(*shape[:-1], 1) + 0.5)  # some weights lie outside
    out = stage(weight)
    out.backward(upstream)
    value, inside, to_alpha = PAPER[num_bits](weight.detach().double(), stage.scale.detach().double())
    g = (shape[-2] * shape[-1] * LARGEST_CODE[num_bits]) ** -0.5
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), value, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(weight.grad, upstream * inside)
    expected = (to_alpha * upstream.double()).sum(-1, keepdim=True) * g
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(stage.scale.grad.double(), expected, **tolerance)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize(("num_bits", "levels"), [(1, 2), (1.58, 3), (2, 4), (3, 8), (4, 16)])
def test_scales_start_as_in_the_code_and_levels_are_few(num_bits, levels, family):
    model = tiny(family)
    install(model, {"type": "paretoq", "weight_bits": num_bits})
    initialise_stages(model)
    for name, site in iter_sites(model):
        weight = site.raw_weight.detach()
        start = weight.abs().mean(-1, keepdim=True) if num_bits == 1 else weight.abs().amax(-1, keepdim=True)
        divisor = {3: 3, 4: 7}.get(num_bits, 1)
        torch.testing.assert_close(site.stages["quant"].scale.detach(), start / divisor)
        rows = site.effective_weight().detach().flatten(0, -2)
        assert max(row.unique().numel() for row in rows) <= levels, name
    scales = {id(p) for name, p in model.named_parameters() if name.endswith("scale")}
    assert undecayed(model) == scales
    loss_of(model, tokens()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("num_bits", [1, 2])
def test_a_mask_before_a_grid_without_zero_holds(num_bits):
    weight = torch.tensor([[0.0, 1.0, -2.0, 0.0]], requires_grad=True)
    stage = make_stage(weight, num_bits)
    out = stage(weight)
    assert (out == 0).tolist() == [[True, False, False, True]]
    out.sum().backward()
    assert weight.grad[0, 0] == weight.grad[0, 3] == 1, "what is pruned must keep its gradient"


@pytest.mark.parametrize("num_bits", PAPER)
def test_degenerate_weights(num_bits):
    for row in (torch.zeros(1, 4), torch.full((1, 4), -3.0)):
        stage = make_stage(row, num_bits)
        stage.initialise(row)
        weight = row.clone().requires_grad_()
        out = stage(weight)
        out.sum().backward()
        torch.testing.assert_close(out, row, rtol=0.6, atol=1e-9)
        assert torch.isfinite(weight.grad).all()
        assert torch.isfinite(stage.scale.grad).all()
    assert make_stage(row, num_bits)(torch.full((1, 4), torch.nan)).isnan().all(), "a NaN is no level"


def test_bits_without_a_grid_are_refused():
    with pytest.raises(ValueError, match=r"set 1, 1\.58, 2, 3 or 4, or use lsq"):
        parse_technique({"type": "paretoq", "weight_bits": 5})
