"""Ternary weights through their entries: every path against the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leanmill.kernels.ternary import cpu
from leanmill.kernels.ternary.naive import ternarise
from leanmill.kernels.ternary.op import ternary
from tests.kernels.launcher import DEVICE, DTYPES


RULES = ["absmean", "twn", "mse"]
DIMS = {"tensor": (-2, -1), "row": (-1,)}


def same(got, expected):
    """Bitwise on the CPU, where sums are in fp64 on both sides; a GPU sums in fp32 first."""
    tolerance = {"rtol": 0, "atol": 0} if DEVICE.type == "cpu" else {}
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, equal_nan=True, **tolerance)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("rule", RULES)
def test_ternary_equals_the_definition(rule, granularity, dtype):
    for shape in ((5, 7), (3, 4, 6), (1, 1), (2, 40_000), (3, 33)):
        weight = (torch.randn(shape, device=DEVICE) * 0.02).to(dtype)
        weight[0] = weight[0].abs().round(decimals=2)  # ties
        leaf = weight.clone().requires_grad_()
        out = ternary(leaf, rule, granularity)
        same(out.detach(), ternarise(weight, rule, DIMS[granularity]))
        upstream = torch.randn_like(out)
        out.backward(upstream)
        assert torch.equal(leaf.grad, upstream)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_shape_and_stride(data):
    shape = data.draw(st.lists(st.integers(0, 9), min_size=2, max_size=4).map(tuple))
    dtype = data.draw(st.sampled_from([*DTYPES, torch.float64]))
    order = data.draw(st.permutations(range(len(shape))))
    weight = torch.randn(shape, device=DEVICE).to(dtype)
    weight = weight.permute(*order).contiguous().permute(*[order.index(dim) for dim in range(len(shape))])
    rule, granularity = data.draw(st.sampled_from(RULES)), data.draw(st.sampled_from(["tensor", "row"]))
    out = ternary(weight, rule, granularity)
    assert out.shape == weight.shape
    if weight.numel():
        same(out, ternarise(weight, rule, DIMS[granularity]))


@pytest.mark.parametrize("rule", RULES)
def test_special_values(rule):
    inf, nan = float("inf"), float("nan")
    rows = [[nan, 1.0, -1.0, 0.1], [inf, 1.0, -1.0, 0.1], [-0.0, 0.0, -0.0, 0.0], [1e-30, -1e-30, 3e38, -3e38]]
    weight = torch.tensor([*rows, [1.0, -0.5, 0.25, 0.0]], device=DEVICE)
    if rule == "mse":  # the order of sorted NaNs is no definition
        weight = weight[2:]
    same(ternary(weight, rule, "row"), ternarise(weight, rule, (-1,)))


def test_one_dim_is_one_row():
    weight = torch.randn(16, device=DEVICE)
    same(ternary(weight), ternarise(weight, "absmean", (-1,)))


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch):
    weight = torch.randn(64, 4096, device=DEVICE)
    found = []
    for num_threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=num_threads: n)
        found.append(ternary(weight, "twn"))
    assert torch.equal(*found)


def test_without_a_compiler_tensor_code_runs(monkeypatch):
    monkeypatch.setattr(cpu, "library", lambda: None)
    weight = torch.randn(5, 12)
    assert torch.equal(ternary(weight), ternarise(weight, "absmean", (-2, -1)))


def test_under_compile_and_opcheck():
    weight = torch.randn(6, 16, device=DEVICE, requires_grad=True)

    def function(w):
        return ternary(w, "twn", "row").sin().sum()

    eager = torch.autograd.grad(function(weight), weight)[0]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(weight), weight)[0], eager)
    torch.library.opcheck(torch.ops.leanmill.ternary.default, (weight, "absmean", 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: ternary(w, "max"), "absmean"),
        (lambda w: ternary(w, "twn", "group"), "row"),
        (lambda w: ternary(w.int()), "int32"),
        (lambda w: ternary(w[0, 0]), "no dims"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 8))
