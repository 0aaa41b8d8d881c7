"""Low-rank deltas: against autograd through plain tensor code, and what they may hold in memory."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from leanmill.kernels.fake_quant import cpu
from leanmill.kernels.fake_quant.op import fake_quant
from leanmill.kernels.lowrank_delta import merged as by_rows
from leanmill.kernels.lowrank_delta import naive
from leanmill.kernels.lowrank_delta.op import lowrank_delta, lowrank_delta_linear
from tests.kernels.launcher import DEVICE, DTYPES


QUANT = {"num_bits": 3, "grid": "signed", "grad_scale": 0.5}


def draw(shape, rank, *, core_rank=None, scale_like=None, has_offset=False, dtype=torch.float64, factors=None):
    *experts, out, width = shape
    factors = factors or dtype
    tensors = {
        "weight": torch.randn(shape, device=DEVICE).to(dtype),
        "a": torch.randn(*experts, rank, width, device=DEVICE).to(factors),
        "b": torch.randn(*experts, out, core_rank or rank, device=DEVICE).to(factors),
        "core": torch.randn(*experts, core_rank, rank, device=DEVICE).to(factors) if core_rank else None,
        "scale": None if scale_like is None else (torch.rand(scale_like, device=DEVICE) * 0.5 + 0.3).to(factors),
        "offset": torch.randn(scale_like, device=DEVICE).mul(0.1).to(factors) if has_offset else None,
    }
    return {name: None if t is None else t.requires_grad_() for name, t in tensors.items()}


def plain(t, scaling, **options):
    """The same as a composition of differentiable tensor code."""
    merged = naive.lowrank_delta(t["weight"], t["a"], t["b"], scaling, t["core"])
    return merged if t["scale"] is None else fake_quant(merged, t["scale"], t["offset"], **QUANT, **options)


def ours(t, scaling, **options):
    quant = {} if t["scale"] is None else QUANT
    core, scale, offset = t["core"], t["scale"], t["offset"]
    return lowrank_delta(t["weight"], t["a"], t["b"], scaling, core, scale=scale, offset=offset, **quant, **options)


def grads(out, upstream, t):
    leaves = {name: leaf for name, leaf in t.items() if leaf is not None and leaf.requires_grad}
    found = torch.autograd.grad(out, list(leaves.values()), upstream)
    return dict(zip(leaves, found, strict=True))


@pytest.fixture(params=[7, 10**6], ids=["many-blocks", "one-block"])
def _block_elements(request, monkeypatch):
    monkeypatch.setattr(by_rows, "_BLOCK_ELEMENTS", dict.fromkeys(("cpu", "cuda"), request.param))


CASES = list(itertools.product([(6, 8), (3, 4, 8), (2, 2, 3, 4)], [None, 3], [False, True]))


@pytest.mark.usefixtures("_block_elements")
@pytest.mark.parametrize(("shape", "core_rank", "has_offset"), CASES)
def test_values_and_gradients(shape, core_rank, has_offset):
    scale_shapes = [None, (1,), (*shape[:-2], 1, 1), (*shape[:-1], 1), (*shape[:-1], 2)]
    for scale_like in scale_shapes:
        has = has_offset and scale_like is not None
        t = draw(shape, 2, core_rank=core_rank, scale_like=scale_like, has_offset=has)
        out, expected = ours(t, 0.7), plain(t, 0.7)
        torch.testing.assert_close(out, expected)
        upstream = torch.randn_like(out)
        found, wanted = grads(out, upstream, t), grads(expected, upstream, t)
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], msg=name)


@pytest.mark.usefixtures("_block_elements")
@pytest.mark.parametrize("core_rank", [None, 3])
@pytest.mark.parametrize("scale_like", [None, (1,), (6, 1), (6, 4)])
def test_linear(scale_like, core_rank):
    t = draw((6, 8), 2, core_rank=core_rank, scale_like=scale_like, has_offset=scale_like is not None)
    t["x"] = torch.randn(2, 5, 8, dtype=torch.float64, device=DEVICE, requires_grad=True)
    t["bias"] = torch.randn(6, dtype=torch.float64, device=DEVICE, requires_grad=True)
    expected = F.linear(t["x"], plain(t, 0.7), t["bias"])
    quant = {} if scale_like is None else QUANT
    rest = {name: t[name] for name in ("core", "bias", "scale", "offset")}
    out = lowrank_delta_linear(t["x"], t["weight"], t["a"], t["b"], 0.7, **rest, **quant)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    found, wanted = grads(out, upstream, t), grads(expected, upstream, t)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], msg=name)


def test_gradcheck():
    t = draw((3, 4), 2, core_rank=2)
    arguments = (t["weight"], t["a"], t["b"], t["core"])
    assert torch.autograd.gradcheck(lambda w, a, b, n: lowrank_delta(w, a, b, 0.7, n), arguments)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True, device=DEVICE)
    assert torch.autograd.gradcheck(lambda x, w, a, b, n: lowrank_delta_linear(x, w, a, b, 0.7, n), (x, *arguments))


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_shape_and_stride(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 7), min_size=2, max_size=3)))
    t = draw(shape, data.draw(st.integers(0, 4)), scale_like=data.draw(st.sampled_from([None, (*shape[:-1], 1)])))
    weight = t["weight"].detach().mT.contiguous().mT.requires_grad_()
    t["weight"] = weight
    out, expected = ours(t, -1.5), plain(t, -1.5)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    found, wanted = grads(out, upstream, t), grads(expected, upstream, t)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_scale", [False, True])
def test_low_precision_weights_with_factors_in_fp32(has_scale, dtype):
    t = draw((16, 32), 4, scale_like=(16, 2) if has_scale else None, dtype=dtype, factors=torch.float32)
    out, expected = ours(t, 0.1), plain(t, 0.1)
    assert out.dtype == dtype
    if has_scale:
        # A merged value that falls the other way at the edge of a step moves by a whole one.
        assert ((out - expected).abs() > 1e-2).float().mean() < 0.01
    else:
        torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    found, wanted = grads(out, upstream, t), grads(expected, upstream, t)
    for name in wanted:
        scale_of = wanted[name].float().abs().max()
        assert (found[name] - wanted[name]).float().abs().max() <= 0.03 * scale_of, name


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in elements; views of the given tensors are not made."""

    def __init__(self, *given):
        super().__init__()
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.given:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_backward_makes_nothing_of_the_weights_size(monkeypatch):
    monkeypatch.setattr(by_rows, "_BLOCK_ELEMENTS", {"cpu": 8 * 64, "cuda": 8 * 64})
    made = []
    new = cpu.large_empty

    def noted(like, *shape, **kwargs):
        made.append(math.prod(shape))
        return new(like, *shape, **kwargs)

    t = draw((96, 64), 2, scale_like=(96, 1), dtype=torch.float32)
    t["weight"].requires_grad_(False)
    x = torch.randn(4, 64, device=DEVICE, requires_grad=True)
    staged = ours(t, 0.5)
    out = lowrank_delta_linear(x, t["weight"], t["a"], t["b"], 0.5, scale=t["scale"], **QUANT)
    upstream, weight_upstream = torch.randn_like(out), torch.randn_like(staged)
    from leanmill.kernels.lowrank_delta.operators import contract

    tensors = [None if t[n] is None else t[n].detach() for n in ("weight", "a", "b", "core", "scale", "offset")]
    function = contract._init_fn
    rest = (0.5, 3, "signed", False, None, False, False, True)
    with Largest(tensors[0]) as linear, torch.no_grad():
        monkeypatch.setattr(cpu, "large_empty", noted)
        function(upstream, *tensors, x.detach(), *rest)
    with Largest(tensors[0], weight_upstream) as weight, torch.no_grad():
        function(weight_upstream, *tensors, None, *rest)
    assert made or DEVICE.type != "cpu"
    assert max(made, default=0) <= 8 * 64
    assert linear.elements <= 8 * 64
    assert weight.elements <= 8 * 64


def test_a_frozen_weight_without_a_grid_is_not_kept():
    t = draw((64, 64), 2, dtype=torch.float32)
    t["weight"].requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        out = ours(t, 0.5)
    assert all(s.numel() < t["weight"].numel() for s in saved)
    assert set(grads(out, torch.ones_like(out), t)) == {"a", "b"}


def test_autocast_changes_nothing():
    t = draw((16, 32), 4, core_rank=2, scale_like=(16, 1), dtype=torch.float32)
    x = torch.randn(5, 32, device=DEVICE, requires_grad=True)
    rest = {name: t[name] for name in ("core", "scale")}

    def run():
        linear = lowrank_delta_linear(x, t["weight"], t["a"], t["b"], 0.7, **rest, **QUANT)
        # Tensor code, on DTensors, has the guard of its own.
        merged = naive.lowrank_delta(t["weight"], t["a"], t["b"], 0.7, t["core"])
        return linear, ours(t, 0.7), merged

    expected = run()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        got = run()
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one, other)
        found = grads(got[1], torch.ones_like(got[1]), t)
    wanted = grads(expected[1], torch.ones_like(expected[1]), t)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_inputs_of_another_dtype_than_the_weight():
    t = draw((8, 16), 2, scale_like=(8, 1), dtype=torch.float32)
    x = torch.randn(3, 16, device=DEVICE).bfloat16().requires_grad_()
    out = lowrank_delta_linear(x, t["weight"], t["a"], t["b"], 0.7, scale=t["scale"], **QUANT)
    expected = F.linear(x, plain(t, 0.7).bfloat16())
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    t["x"] = x
    found, wanted = grads(out, upstream, t), grads(expected, upstream, t)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=2e-2, atol=2e-2, msg=name)


def test_repeats_bitwise():
    t = draw((64, 128), 4, scale_like=(1,), dtype=torch.float32)
    upstream = torch.randn(64, 128, device=DEVICE)
    one, other = (grads(ours(t, 0.5), upstream, t) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_under_compile_and_opcheck():
    t = draw((6, 8), 2, core_rank=3, scale_like=(6, 1), has_offset=True, dtype=torch.float32)
    x = torch.randn(5, 8, device=DEVICE, requires_grad=True)
    rest = {name: t[name] for name in ("core", "scale", "offset")}

    def function(x):
        linear = lowrank_delta_linear(x, t["weight"], t["a"], t["b"], 0.7, **rest, **QUANT)
        return (linear.sin() @ ours(t, 0.7)).sum()

    leaves = [x, *(leaf for leaf in t.values() if leaf is not None)]
    eager = torch.autograd.grad(function(x), leaves)
    compiled = torch.autograd.grad(torch.compile(function, fullgraph=True, backend="aot_eager")(x), leaves)
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other)
    tensors = [t[name] for name in ("weight", "a", "b", "core", "scale", "offset")]
    options = (0.7, 3, "signed", False, None, False)
    torch.library.opcheck(torch.ops.leanmill.lowrank_delta.default, (*tensors, *options))
    torch.library.opcheck(torch.ops.leanmill.lowrank_delta_linear.default, (*tensors, x, *options))
    no_grid = [*tensors[:4], None, None]
    torch.library.opcheck(torch.ops.leanmill.lowrank_delta.default, (*no_grid, *options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(3, 8)}, r"a \(3, 8\), b \(6, 2\)"),
        ({"a": torch.zeros(2, 7)}, r"\(2, 7\)"),
        ({"b": torch.zeros(5, 2)}, r"\(5, 2\)"),
        ({"core": torch.zeros(3, 2)}, r"core \(3, 2\)"),
        ({"a": torch.zeros(2, 8, dtype=torch.int32)}, "int32"),
        ({"b": torch.zeros(6, 2, device="meta")}, "meta"),
        ({"offset": torch.zeros(6, 1)}, "without scale"),
        ({"scale": torch.zeros(5, 1)}, r"\(6, 1\) a row"),
        ({"scale": torch.zeros(6, 1), "num_bits": 12}, "12"),
        ({"x": torch.zeros(3, 7)}, r"\(3, 7\)"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    arguments = {"weight": torch.zeros(6, 8), "a": torch.zeros(2, 8), "b": torch.zeros(6, 2), "scaling": 1.0}
    function = lowrank_delta_linear if "x" in change else lowrank_delta
    with pytest.raises(ValueError, match=message):
        function(**(arguments | change))
