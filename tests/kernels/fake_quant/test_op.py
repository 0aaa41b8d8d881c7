"""Fake quantisation through its entry: every path against the definition, and what surrounds it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leanmill.kernels.fake_quant import cpu, dispatch, naive
from leanmill.kernels.fake_quant.activations import int8_activations, quantise_activations
from leanmill.kernels.fake_quant.grid import make_grid, scale_shape
from leanmill.kernels.fake_quant.op import fake_quant
from tests.kernels.launcher import DEVICE, DTYPES, poison_new_memory


KINDS = [(4, "signed"), (2, "symmetric"), (3, "unsigned"), (1, "midrise"), (8, "midrise")]


def scale_shapes(shape):
    rows = (*shape[:-1], 1)
    shapes = [(), (1,), rows, (*shape[:-1], shape[-1] // 4)] if shape[-1] % 4 == 0 else [(1,), rows]
    return [*shapes, (*shape[:-2], 1, 1)]


def draw(shape, scale_like, dtype, has_offset=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    scale = (torch.rand(scale_like, generator=generator) * 0.4 + 0.1).to(DEVICE)
    offset = torch.randn(scale_like, generator=generator).mul(0.1).to(DEVICE) if has_offset else None
    return weight, scale, offset, torch.randn(shape, generator=generator).to(DEVICE, dtype)


def check(weight, scale, offset, grad, bits, kind, gradient="lsq"):
    """Outputs and gradients of the entry against the definition."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (weight, scale, offset)]
    common = {"num_bits": bits, "grid": kind, "gradient": gradient, "grad_scale": 0.25}
    out = fake_quant(*leaves, **common)
    out.backward(grad)
    shape = scale_shape(weight, scale)
    scale, offset = scale.view(shape), None if offset is None else offset.view(shape)
    grid = make_grid(bits, kind)
    # Decisions are those of tensor code bit for bit on the CPU; a GPU may contract q * s + offset.
    exact = {"rtol": 0, "atol": 0} if weight.device.type == "cpu" else {}
    torch.testing.assert_close(out.detach(), naive.forward(weight, scale, offset, grid), equal_nan=True, **exact)
    expected = naive.gradients(grad, weight, scale, offset, grid, 0.25, gradient == "straight_through")
    torch.testing.assert_close(leaves[0].grad, expected[0], equal_nan=True, **exact)
    for leaf, e in zip(leaves[1:], expected[1:], strict=True):
        if leaf is not None:
            sums = {"rtol": 1e-4, "atol": 2e-5 * weight.numel() ** 0.5}
            torch.testing.assert_close(leaf.grad, e.view(leaf.shape), equal_nan=True, **sums)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("has_offset", [False, True])
@pytest.mark.parametrize(("bits", "kind"), KINDS)
def test_equals_the_definition(bits, kind, has_offset, dtype):
    for shape in ((7, 12), (2, 3, 20), (1, 1), (5, 33)):
        for scale_like in scale_shapes(shape):
            check(*draw(shape, scale_like, dtype, has_offset), bits, kind)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_shape_and_stride(data):
    shape = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple))
    dtype = data.draw(st.sampled_from([*DTYPES, torch.float64]))
    options = [(1,), (*shape[:-1], 1)]
    options += [(*shape[:-1], d) for d in range(2, shape[-1] + 1) if shape[-1] % d == 0]
    scale_like = data.draw(st.sampled_from(options))
    weight, scale, offset, grad = draw(
        shape, scale_like, dtype, data.draw(st.booleans()), data.draw(st.integers(0, 99))
    )
    order = data.draw(st.permutations(range(len(shape))))
    inverse = [order.index(dim) for dim in range(len(shape))]
    weight = weight.permute(*order).contiguous().permute(*inverse)
    check(weight, scale, offset, grad, *data.draw(st.sampled_from(KINDS)))


def test_sums_over_many_segments():
    # More than one segment a scale, the last one short.
    check(*draw((3, 8 * 700), (1,), torch.float32, True), 4, "signed")
    check(*draw((3, 8 * 700), (3, 1), torch.bfloat16, True), 4, "signed")


def test_every_element_is_written(monkeypatch):
    weight, scale, _, grad = draw((9, 130), (9, 1), torch.float32)
    poisoned = poison_new_memory(monkeypatch)
    grid = make_grid(4, "signed")
    assert torch.isfinite(dispatch.forward(weight, scale, None, grid)).all()
    assert all(torch.isfinite(t).all() for t in dispatch.gradients(grad, weight, scale, None, grid, 1.0)[:2])
    assert poisoned.count(weight.shape) >= 2


def test_special_values():
    inf, nan = float("inf"), float("nan")
    row = [0.0, -0.0, inf, -inf, nan, 1.0, -1.0, 0.25, 1e38, -1e-38, 3.0, 3.0, nan, -nan, 2.0, -2.0]
    weight = torch.tensor([row, row[::-1]], device=DEVICE)
    for scale in (torch.ones(2, 1), torch.tensor([[nan], [0.5]]), torch.tensor([[0.0], [-2.0]])):
        check(weight, scale.to(DEVICE), None, torch.ones_like(weight), 4, "signed")


def test_ties_round_to_even_and_edges_are_inside():
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 7.0, 7.25, -8.0, -8.25]], device=DEVICE, requires_grad=True)
    out = fake_quant(weight, torch.ones(1, device=DEVICE), num_bits=4)
    out.sum().backward()
    assert out.tolist() == [[0, 2, 2, 0, -2, 7, 7, -8, -8]]
    assert weight.grad.tolist() == [[1, 1, 1, 1, 1, 1, 0, 1, 0]]


def test_the_default_factor_is_that_of_lsq():
    weight, scale, _, grad = draw((4, 16), (4, 1), torch.float32)
    for like, sharing in (((1,), 64), ((4, 1), 16), ((4, 4), 4)):
        found = []
        for grad_scale in (None, 1.0):
            s = torch.full(like, 0.3, device=DEVICE, requires_grad=True)
            fake_quant(weight, s, num_bits=3, grad_scale=grad_scale).backward(grad)
            found.append(s.grad)
        torch.testing.assert_close(found[0], found[1] / (sharing * 3) ** 0.5)


def test_frozen_weights_and_frozen_scales():
    weight, scale, offset, grad = draw((4, 16), (4, 2), torch.float32, True)
    for wants in ((True, False, False), (False, True, False), (False, False, True), (False, True, True)):
        leaves = [t.clone().requires_grad_(want) for t, want in zip((weight, scale, offset), wants, strict=True)]
        fake_quant(*leaves, num_bits=4).backward(grad)
        everything = [t.clone().requires_grad_() for t in (weight, scale, offset)]
        fake_quant(*everything, num_bits=4).backward(grad)
        for leaf, want, full in zip(leaves, wants, everything, strict=True):
            assert (leaf.grad is not None) == want
            if want:
                assert torch.equal(leaf.grad, full.grad)


def test_nothing_but_the_inputs_is_saved():
    weight, scale, _, _ = draw((64, 64), (64, 1), torch.float32)
    leaf = weight.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fake_quant(leaf, scale.requires_grad_(), num_bits=4)
    assert all(t.data_ptr() in (leaf.data_ptr(), scale.data_ptr()) for t in saved)


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch):
    weight, scale, offset, grad = draw((64, 4096), (1,), torch.float32, True)
    grid = make_grid(4, "signed")
    found = []
    for num_threads in (1, 3, 1):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=num_threads: n)
        out = dispatch.forward(weight, scale, offset, grid)
        found.append((out, *dispatch.gradients(grad, weight, scale, offset, grid, 1.0)))
    for one, other in zip(found[0], found[1], strict=True):
        assert torch.equal(one, other)
    for one, other in zip(found[0], found[2], strict=True):
        assert torch.equal(one, other)


def test_under_compile():
    weight, scale, offset, grad = draw((6, 16), (6, 2), torch.float32, True)

    def function(weight, scale, offset):
        return fake_quant(weight, scale, offset, num_bits=4).sin()

    found = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [t.detach().clone().requires_grad_() for t in (weight, scale, offset)]
        out = run(*leaves)
        out.backward(grad)
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_opcheck():
    weight, scale, offset, _ = draw((6, 16), (6, 2), torch.float32, True)
    leaves = [t.requires_grad_() for t in (weight, scale, offset)]
    for op, arguments in (
        (torch.ops.leanmill.fake_quant, (*leaves, 4, "signed", False, None)),
        (torch.ops.leanmill.fake_quant, (leaves[0], leaves[1], None, 4, "signed", True, 1.0)),
        (torch.ops.leanmill.fake_int8_activations, (leaves[0], 1e-5)),
        (torch.ops.leanmill.int8_activations, (weight.detach(), 1e-5)),
    ):
        torch.library.opcheck(op.default, arguments)


def test_without_a_compiler_tensor_code_runs(monkeypatch):
    monkeypatch.setattr(cpu, "library", lambda: None)
    check(*draw((5, 12), (5, 3), torch.bfloat16, True), 4, "signed")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bits": 9}, "1 to 8"),
        ({"num_bits": 0}, "1 to 8"),
        ({"num_bits": 1}, "midrise"),
        ({"grid": "round"}, "signed"),
        ({"gradient": "none"}, "straight_through"),
        ({"scale": torch.ones(4)}, r"\(4, 1\) a row"),
        ({"scale": torch.ones(4, 3)}, r"\(4, 3\)"),
        ({"scale": torch.ones(8, 1)}, r"\(4, 8\)"),
        ({"scale": torch.ones(4, 1, dtype=torch.int32)}, "int32"),
        ({"scale": torch.ones(4, 1, device="meta")}, "meta"),
        ({"offset": torch.ones(1)}, r"\(4, 1\)"),
        ({"weight": torch.ones(4, 8, dtype=torch.int8)}, "int8"),
        ({"weight": torch.tensor(1.0)}, "no dims"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    arguments = {"weight": torch.randn(4, 8), "scale": torch.ones(4, 1), "num_bits": 4} | change
    with pytest.raises(ValueError, match=message):
        fake_quant(**arguments)


def test_meta_and_empty():
    meta = torch.empty(4, 8, device="meta")
    assert fake_quant(meta, torch.empty(4, 1, device="meta"), num_bits=4).shape == (4, 8)
    for shape in ((0, 8), (4, 0)):
        weight = torch.empty(shape, requires_grad=True)
        scale = torch.ones(shape[0], 1, requires_grad=True)
        fake_quant(weight, scale, num_bits=4).sum().backward()
        assert scale.grad.abs().sum() == 0
        assert quantise_activations(weight).shape == shape


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_activations(dtype):
    tokens = (torch.randn(2, 5, 67, device=DEVICE) * 3).to(dtype)
    tokens[0, 0] = 0
    tokens[0, 1, 3] = float("nan")
    tokens[0, 2, 3] = float("inf")
    leaf = tokens.clone().requires_grad_()
    out = quantise_activations(leaf)
    upstream = torch.randn_like(tokens)
    out.backward(upstream)
    assert torch.equal(leaf.grad, upstream)
    codes, steps = naive.activations(tokens, 1e-5)
    got_codes, got_steps = int8_activations(tokens)
    assert torch.equal(got_codes, codes)
    torch.testing.assert_close(got_steps, steps, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(out, (codes * steps).to(dtype), rtol=0, atol=0, equal_nan=True)
    assert (out[0, 0] == 0).all()
    assert out[0, 1].isnan().all()


def test_activations_that_do_not_fit():
    with pytest.raises(ValueError, match="int64"):
        quantise_activations(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="smallest"):
        int8_activations(torch.zeros(3), smallest=0.0)
