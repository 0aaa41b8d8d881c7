"""Several bases, kept salient weights and periodic signs against the papers' formulas, written out."""

import pytest
import torch

from leanmill.core.registry import parse_technique
from leanmill.core.rules import StepContext
from leanmill.core.sites import iter_sites
from leanmill.quant.binary.stage import BinaryStage, PeriodicStage, SalientStage
from leanmill.quant.sharing import Sharing
from tests.core.tiny import install, tiny


def mean_magnitude(values, granularity):
    dims = (-2, -1) if granularity == "tensor" else (-1,)
    return values.abs().mean(dims, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 9), (3, 4, 7)])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_a_basis_takes_what_the_ones_before_left(granularity, shape, dtype):
    weight, upstream = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)
    stage = BinaryStage(Sharing(granularity), center=False, num_bases=3)
    out = stage(weight)
    out.backward(upstream)
    rest, total = weight.detach().double(), 0.0
    for _ in range(3):
        # BinaryDM, eq. 5 to 8: sigma sign(what is left), sigma its mean magnitude.
        basis = torch.where(rest >= 0, 1.0, -1.0) * mean_magnitude(rest, granularity)
        rest, total = rest - basis, total + basis
    torch.testing.assert_close(out.double(), total, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(weight.grad, upstream)
    assert stage.codes(weight.detach()) is None
    stage.switch_to(1)
    assert torch.equal(stage(weight), BinaryStage(Sharing(granularity), center=False)(weight))


def test_bases_of_parts_are_those_of_the_whole():
    weight = torch.randn(6, 5)
    weight[2] = 0
    stage = BinaryStage(Sharing("tensor"), center=True, num_bases=2)
    parts = [stage.on_part(part, weight.shape) for part in (weight[:4], weight[4:4], weight[4:])]
    sums = sum(next(part).value for part in parts)
    sums = sum(part.send(sums).value for part in parts)
    found = []
    for part in parts:
        with pytest.raises(StopIteration) as end:
            part.send(sums)
        found.append(end.value.value)
    assert torch.equal(torch.cat(found), stage(weight))
    assert not stage(weight)[2].any(), "what a mask pruned stays zero in every basis"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 20), (2, 3, 10)])
def test_salient_weights_rest_at_eight_bits(shape, dtype):
    torch.manual_seed(0)
    loaded = torch.randn(shape)
    stage = SalientStage(loaded, 0.1, Sharing("row"), center=False)
    stage.initialise(loaded)
    weight = (loaded + 0.3 * torch.randn(shape)).to(dtype).requires_grad_()  # trained for a while
    upstream = torch.randn(shape).to(dtype)
    out = stage(weight)
    out.backward(upstream)
    num_kept = round(0.1 * shape[-2] * shape[-1])
    flat = loaded.abs().flatten(-2)
    kept = (flat >= flat.topk(num_kept, dim=-1).values[..., -1:]).view(shape)
    scale = loaded.abs().amax(-1, keepdim=True) / 127
    eight_bits = (loaded / scale).round() * scale
    others = torch.where(kept, 0.0, weight.detach().double())
    # Their paper's eq. 6: the scale that is best for signs is the mean magnitude, here of each row.
    alpha = others.abs().sum(-1, keepdim=True) / (~kept).sum(-1, keepdim=True)
    expected = torch.where(kept, eight_bits.double(), torch.where(others >= 0, alpha, -alpha))
    torch.testing.assert_close(out.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    assert torch.equal(weight.grad, upstream.masked_fill(kept, 0.0))
    pruned = weight.detach().clone()
    pruned[..., ::2] = 0
    assert not stage(pruned)[..., ::2].any(), "a mask holds"


def test_salient_weights_of_rows_of_zeros_and_constants():
    loaded = torch.zeros(4, 8)
    loaded[1] = 3.0
    stage = SalientStage(loaded, 0.25, Sharing("row"), center=False)
    stage.initialise(loaded)
    out = stage(loaded)
    assert torch.equal(out, loaded), "a constant is its own level, and its own 8 bits"
    assert int((stage.kept != 0).sum()) == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strength", [None, 0.0, 0.5, 1.0])
def test_signs_of_a_wave_have_its_gradient(strength, dtype):
    weight, upstream = torch.randn(4, 7).to(dtype), torch.randn(4, 7).to(dtype)
    weight[0, 0] = 0
    weight.requires_grad_()
    stage = PeriodicStage(3.0, Sharing("row"), has_warmup=strength is not None)
    if strength is not None:
        stage.strength.fill_(strength)
    out = stage(weight)
    out.backward(upstream)
    exact = weight.detach().double().requires_grad_()
    alpha = exact.detach().abs().sum(-1, keepdim=True) / (exact != 0).sum(-1, keepdim=True)
    wave = alpha * torch.sin(3.0 * exact)
    wave.backward(upstream.double())
    share = 1.0 if strength is None else strength
    expected = wave.detach() + share * (alpha * wave.detach().sign() - wave.detach())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=4 * eps, atol=2 * eps)
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=4 * eps, atol=4 * eps)


def test_compiled_signs_are_the_same():
    weight, upstream = torch.randn(4, 8), torch.randn(4, 8)
    plain, salient = Sharing("tensor"), SalientStage(weight, 0.2, Sharing("row"), center=False)
    salient.reset_parameters()
    salient.initialise(weight)
    for stage in (BinaryStage(plain, center=True), BinaryStage(plain, center=True, num_bases=2), salient):
        leaves = [weight.clone().requires_grad_() for _ in range(2)]
        compiled = torch.compile(stage, fullgraph=True, backend="eager")
        out = [run(leaf) for run, leaf in zip((stage, compiled), leaves, strict=True)]
        assert torch.equal(*out)
        for one in out:
            one.backward(upstream)
        assert torch.equal(*(leaf.grad for leaf in leaves))


def test_further_bases_go_in_the_course_of_a_run():
    model = tiny()
    raw = {"type": "binary", "granularity": "row", "num_bases": 2, "bases_until": 0.5}
    (rule,) = install(model, raw).step_rules
    site = next(site for _, site in iter_sites(model))
    for step, levels in ((0, 4), (4, 4), (5, 2), (9, 2)):
        rule.begin_step(StepContext(step=step, num_steps=10, num_micro_batches=1))
        assert site.effective_weight()[0].unique().numel() == levels


def test_requests_that_do_not_fit():
    for raw, match in [
        ({"num_bases": 2, "salient": 0.1}, "different methods"),
        ({"frequency": 20.0}, "center: false"),
        ({"bases_until": 0.5}, "num_bases: 2"),
        ({"num_bases": 2, "bases_until": 1.5}, "bases_until: 2"),
        ({"num_bases": 5}, "less than or equal to 4"),
        ({"salient": 1.0}, "less than 1"),
    ]:
        with pytest.raises(ValueError, match=match):
            parse_technique({"type": "binary", **raw})
    config = parse_technique({"type": "binary", "num_bases": 2, "bases_until": 10})
    assert "set it below 10" in " ".join(config.problems_in_a_run_of(10))
    assert not list(config.problems_in_a_run_of(11))
