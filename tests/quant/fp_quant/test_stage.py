"""Floating-point formats against their tables and formulas, written out, and against torchao's."""

import itertools
import math

import pytest
import torch
from torch import nn

from leanmill.core.errors import ConfigError
from leanmill.core.registry import parse_technique
from leanmill.core.sites import Sites
from leanmill.quant.floats import FloatGrid
from leanmill.quant.fp_quant.formats import BLOCK_FORMATS, format_of
from leanmill.quant.fp_quant.stage import FloatActivations, TokenRounding, grid_of, make_weights
from tests.core.tiny import install, loss_of, tiny, tokens


TABLES = {
    "e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    "e1m2": [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5],
    "e3m0": [0, 0.25, 0.5, 1, 2, 4, 8, 16],
    "e0m3": [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75],
    "e2m3": [k / 8 for k in range(16)] + [k / 4 for k in range(8, 16)] + [k / 2 for k in range(8, 16)],
}
"""Non-negative values in the order of their codes."""


def nearest(values, table):
    """The nearest entry; of two as near, that with the even code."""
    table = torch.tensor(sorted(set(table)), dtype=torch.float64)
    distances = (values.abs().double().unsqueeze(-1) - table).abs()
    least = distances.amin(-1, keepdim=True)
    is_least = distances == least
    codes = torch.arange(len(table))
    even = (is_least & (codes % 2 == 0)).double()
    choice = torch.where(is_least.sum(-1) > 1, even.argmax(-1), is_least.double().argmax(-1))
    return (table[choice] * values.sign()).to(values.dtype)


@pytest.mark.parametrize("name", TABLES)
def test_levels_and_ties(name):
    table = TABLES[name]
    grid = grid_of(format_of(name))
    # With no bit of mantissa the larger of two as near is taken (IEEE 754-2019, 4.3.1).
    middles = [] if name == "e3m0" else [(a + b) / 2 for a, b in itertools.pairwise(sorted(set(table)))]
    values = torch.tensor([*table, *middles, *torch.linspace(0, 1.5 * max(table), 996).tolist(), 1e6])
    values = torch.cat([values, -values])
    assert torch.equal(grid.snapped(values), nearest(values, table))
    assert torch.equal(grid.snapped(values.double()), nearest(values.double(), table)), "fp64 has other bits"
    assert grid.snapped(torch.tensor([math.nan])).isnan().all()


def test_ties_of_powers_of_two():
    assert grid_of(format_of("e3m0")).snapped(torch.tensor([0.125, 0.75, -1.5])).tolist() == [0, 1, -2]


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_eight_bits_are_torchs(name, dtype):
    values = torch.randn(20000) * torch.exp(4 * torch.randn(20000))
    limit = torch.finfo(dtype).max
    assert torch.equal(grid_of(format_of(name)).snapped(values), values.clamp(-limit, limit).to(dtype).float())


def test_bfloat16_is_e8m7():
    values = torch.randn(1000) * torch.exp(20 * torch.randn(1000))
    stage = make_weights([format_of("e8m7")], None, None, None)
    assert torch.equal(stage(values.reshape(10, 100)), values.reshape(10, 100).bfloat16().float())
    fewer = make_weights([format_of("e8m2")], None, None, None)(values.reshape(10, 100))
    assert (fewer.view(torch.int32) & ((1 << 21) - 1) == 0).all(), "all but two mantissa bits are zero"


def shared_exponent(block, largest_code, rule):
    amax = block.abs().max().item()
    if amax == 0:
        return 2.0**-126
    if rule == "floor":
        return 2.0 ** (math.floor(math.log2(amax)) - math.floor(math.log2(largest_code)))
    return 2.0 ** math.ceil(math.log2(amax / largest_code))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["floor", "ceil"])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e2m3", "mxint4"])
def test_microscaling(name, rule, dtype):
    table = TABLES[{"mxfp4": "e2m1", "mxfp6_e2m3": "e2m3", "mxint4": "e0m3"}[name]]
    weight = (torch.randn(3, 64) * torch.tensor([[1.0], [37.0], [1e-3]])).to(dtype)
    weight[1, :32] = 0
    expected = weight.double().reshape(-1, 32)
    for row in expected:
        scale = shared_exponent(row, max(table), rule)
        row.copy_(nearest(row / scale, table) * scale)
    stage = make_weights([format_of(name)], None, None, None, rule)
    assert torch.equal(stage(weight).double(), expected.reshape(3, 64))
    assert torch.equal(
        FloatActivations(TokenRounding(format_of(name), shared_exponent=rule))(weight).double(), expected.reshape(3, 64)
    )


def nvfp4(values, whole):
    outer = whole.float() / (448 * 6)
    blocks = values.float().reshape(*values.shape[:-1], -1, 16)
    scale = (blocks.abs().amax(-1, keepdim=True) / 6 / outer).clamp(2**-6, 448).to(torch.float8_e4m3fn).float()
    return (
        (nearest(blocks * (1 / outer / scale), TABLES["e2m1"]) * (scale * outer)).reshape(values.shape).to(values.dtype)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_levels_of_scales(dtype):
    weight = (torch.randn(2, 5, 48) * torch.exp(3 * torch.randn(2, 5, 1))).to(dtype)
    experts = make_weights([format_of("nvfp4")], None, None, None)(weight)
    for expert, got in zip(weight, experts, strict=True):
        assert torch.equal(got, nvfp4(expert, expert.abs().max().reshape(1, 1, 1)))
    got = FloatActivations(TokenRounding(format_of("nvfp4")))(weight)
    assert torch.equal(got, nvfp4(weight, weight.abs().amax(-1)[..., None, None])), "an outer scale a token"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_torchaos(dtype):
    pytest.importorskip("torchao")
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    weight = (torch.randn(40, 96) * torch.exp(3 * torch.randn(40, 1))).to(dtype)
    weight[3], weight[4, :32] = 0, 0
    theirs = {
        "mxfp4": torch.float4_e2m1fn_x2,
        "mxfp6_e2m3": DTYPE_FP6_E2M3,
        "mxfp6_e3m2": DTYPE_FP6_E3M2,
        "mxfp8_e4m3": torch.float8_e4m3fn,
        "mxfp8_e5m2": torch.float8_e5m2,
    }
    modes = {"floor": ScaleCalculationMode.FLOOR, "ceil": ScaleCalculationMode.RCEIL}
    for (name, element), (rule, mode) in itertools.product(theirs.items(), modes.items()):
        got = make_weights([format_of(name)], None, None, None, rule)(weight)
        assert torch.equal(got, MXTensor.to_mx(weight, element, 32, mode).dequantize(dtype)), (name, rule)
    packed = NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=per_tensor_amax_to_scale(weight.abs().amax()))
    assert torch.equal(make_weights([format_of("nvfp4")], None, None, None)(weight), packed.dequantize(dtype))


def test_searches_take_what_has_the_least_error():
    weight = torch.randn(6, 64)
    weight[:, 0] *= 8
    tables = {name: TABLES[name] for name in ("e1m2", "e2m1", "e3m0")}

    def error(out):
        return (out - weight).square().sum(-1)

    def written_out(name, scales):
        forms = [nearest(weight / scale, TABLES[name]) * scale for scale in scales]
        return torch.stack([error(form) for form in forms]).amin(0)

    amax = weight.abs().amax(-1, keepdim=True)
    for name, table in tables.items():
        exponent = torch.tensor([[2.0 ** math.ceil(math.log2(a / max(table)))] for a in amax.flatten().tolist()])
        got = make_weights([format_of(name)], "power_of_two", None, None, "mse")(weight)
        torch.testing.assert_close(error(got), written_out(name, [exponent, exponent / 2, exponent / 4]))
        got = make_weights([format_of(name)], "mse", None, None)(weight)
        torch.testing.assert_close(
            error(got), written_out(name, [amax / max(table) * (1 - 0.02 * k) for k in range(40)])
        )
    each = [make_weights([format_of(name)], "absmax", None, None)(weight) for name in tables]
    got = make_weights([format_of(name) for name in tables], "absmax", None, None)(torch.stack([weight, weight]))
    best = min(each, key=lambda out: error(out).sum().item())
    assert torch.equal(got, torch.stack([best, best]))


@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
@pytest.mark.parametrize(
    ("weight_format", "activation_format"), [("e2m1", "e4m3"), ("e3m2", "mxfp8_e4m3"), ("e2m1", None)]
)
def test_a_layer_and_its_straight_through_gradients(weight_format, activation_format, granularity):
    model = nn.Sequential(nn.Linear(64, 5, dtype=torch.float64))
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach()
    raw = {"type": "fp_quant", "weight_format": weight_format, "activation_format": activation_format}
    raw |= {"granularity": granularity, "group_size": 16 if granularity == "group" else None}
    parse_technique(raw).install(Sites(model), None)
    x = torch.randn(2, 3, 64, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 3, 5, dtype=torch.float64)
    dims, size = ((-2, -1), 64) if granularity == "tensor" else ((-1,), 16 if granularity == "group" else 64)
    grid = grid_of(format_of(weight_format))
    groups = weight.reshape(5, 64) if granularity == "tensor" else weight.reshape(5, -1, size)
    scale = groups.abs().amax(dims, keepdim=True) / grid.largest_code
    w_q, x_q = (grid.snapped(groups / scale) * scale).reshape(5, 64), x.detach()
    if activation_format == "e4m3":
        step = x_q.abs().amax(-1, keepdim=True) / 448
        x_q = grid_of(format_of("e4m3")).snapped(x_q / step) * step
    elif activation_format is not None:
        x_q = FloatActivations(TokenRounding(format_of(activation_format)))(x_q)
    out = model(x)
    out.backward(upstream)
    torch.testing.assert_close(out.detach(), x_q @ w_q.T + bias)
    torch.testing.assert_close(x.grad, upstream @ w_q)
    torch.testing.assert_close(model[0].weight.grad, upstream.flatten(0, 1).T @ x_q.flatten(0, 1))


@pytest.mark.parametrize("name", [*BLOCK_FORMATS, "e2m1", "e8m3"])
def test_degenerate_weights(name):
    stage = make_weights([format_of(name)], None, None, None)
    assert not stage(torch.zeros(2, 32)).any(), "zeros stay zeros"
    constant = stage(torch.full((2, 32), -0.7))
    assert (constant == constant[0, 0]).all()
    assert constant[0, 0].item() == pytest.approx(-0.7, rel=0.3)
    tiny_values = stage(torch.full((2, 32), 1e-42))
    assert tiny_values.isfinite().all()
    spoilt = torch.ones(2, 64)
    spoilt[1, 40] = math.nan
    assert stage(spoilt)[1, 40].isnan(), "a NaN must not become a number"
    spoilt[1, 40] = math.inf
    assert not stage(spoilt)[1, 40].isfinite()


def test_inside_models():
    for family in ("llama", "mixtral"):
        model, plain, ids = tiny(family), tiny(family), tokens()
        raw = {"weight_format": "e4m3", "activation_format": "mxfp8_e4m3", "exclude": ["*down_proj"]}
        install(model, {"type": "fp_quant", **raw})
        loss_of(model, ids).backward()
        loss_of(plain, ids).backward()
        for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
            assert 0 < (p.grad - q.grad).norm() / p.grad.norm() < 0.2, name


def test_requests_that_do_not_fit():
    def parse(**raw):
        return parse_technique({"type": "fp_quant", **raw})

    for raw, match in [
        ({"weight_format": "mxpf4"}, "did you mean mxfp4"),
        ({"weight_format": "e9m1"}, "0 to 8 bits"),
        ({"activation_format": "fp4"}, "e3m0"),
        ({"scale": "mse"}, "blocks of 32; remove it"),
        ({"weight_format": "nvfp4", "granularity": "row"}, "blocks of 16; remove it"),
        ({"weight_format": "e8m3", "scale": "absmax"}, "range of fp32"),
        ({"weight_format": "e5m2", "scale": "none", "granularity": "row"}, "share none"),
        ({"weight_format": "e2m1", "shared_exponent": "ceil"}, "power_of_two"),
        ({"weight_format": "e2m1", "granularity": "group"}, "group_size"),
    ]:
        with pytest.raises(ValueError, match=match):
            parse(**raw)
    for kept in (
        {},
        {"weight_format": "e2m1", "scale": "power_of_two"},
        {"weight_format": "fp4", "granularity": "row"},
    ):
        config = parse(**kept)
        assert parse(**config.model_dump(exclude={"type"})) == config, "what a checkpoint holds is read again"
    with pytest.raises(ConfigError, match=r"fp_quant\.exclude"):
        install(tiny(), {"type": "fp_quant"})


def test_a_grid_without_range():
    assert FloatGrid(2, 1, 6.0).smallest_exponent == 0
    assert FloatGrid(8, 7, 3e38).smallest_exponent == -119, "no step is a subnormal of fp32"
