"""The N:M operations as callers see them: every path against the definitions, gradients, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leanmill.kernels.nm_mask import cpu, naive, op
from leanmill.kernels.nm_mask.op import nm_compress, nm_expand, nm_mask, nm_project, to_semi_structured
from tests.kernels.launcher import DEVICE, poison_new_memory
from tests.kernels.nm_mask.test_naive import DTYPES, PATTERNS, SPECIAL


FLOATS = st.sampled_from(DTYPES)


def drawn(shape, dtype, kind="normal"):
    """Weights on the device under test: normal, full of ties, or full of special values."""
    if kind == "ties":
        return (torch.randint(-3, 4, shape) * 0.5).to(DEVICE, dtype)
    if kind == "special":
        return torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape)].to(DEVICE, dtype)
    return torch.randn(shape).to(DEVICE, dtype)


def same(got, expected):
    """Equal bit for bit, NaNs included."""
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_c_is_compiled_here():
    # Without it the tests below would compare tensor code with itself.
    if DEVICE.type == "cpu":
        assert cpu.library() is not None


@pytest.mark.parametrize("kind", ["normal", "ties", "special"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_kept", "group_size"), PATTERNS)
def test_masks_and_projections_equal_the_definition(num_kept, group_size, dtype, kind):
    for num_groups in (1, 7, 70):
        weight = drawn((2, 3, num_groups * group_size), dtype, kind)
        before = weight.clone()
        mask = nm_mask(weight, num_kept, group_size)
        assert torch.equal(mask, naive.nm_mask_by_sort(weight, num_kept, group_size))
        same(nm_project(weight, num_kept, group_size), torch.where(mask, weight, 0.0))
        same(weight, before)


@pytest.mark.parametrize("kind", ["normal", "ties", "special"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 4), (8, 12), (2, 4, 260), (3, 2, 12, 520)])
def test_transposable_equals_the_definition(shape, dtype, kind):
    weight = drawn(shape, dtype, kind)
    mask = nm_mask(weight, transposable=True)
    assert torch.equal(mask, naive.tile_mask(weight))
    assert torch.equal(nm_mask(weight.mT, transposable=True).mT.sum((-2, -1)), mask.sum((-2, -1)))
    same(nm_project(weight, transposable=True), torch.where(mask, weight, 0.0))


@given(st.integers(0, 3), st.integers(1, 40), st.integers(2, 256), FLOATS, st.integers(1, 3), st.data())
@settings(max_examples=25, deadline=None)
def test_any_pattern_shape_and_stride(num_rows, num_groups, group_size, dtype, step, data):
    num_kept = data.draw(st.integers(1, group_size - 1))
    whole = drawn((num_rows * step, num_groups * group_size + 3), dtype, data.draw(st.sampled_from(["normal", "ties"])))
    weight = whole[::step, 1 : 1 + num_groups * group_size]
    if data.draw(st.booleans()):
        weight = weight.t().contiguous().t()
    assert torch.equal(nm_mask(weight, num_kept, group_size), naive.nm_mask_by_sort(weight, num_kept, group_size))
    same(nm_project(weight, num_kept, group_size), naive.project(weight, num_kept, group_size, False))
    values, indices = nm_compress(weight, num_kept, group_size)
    same(values, naive.compress(weight, num_kept, group_size)[0])
    assert torch.equal(indices, naive.compress(weight, num_kept, group_size)[1])
    same(nm_expand(values, indices, num_kept, group_size), naive.project(weight, num_kept, group_size, False))


def test_neighbours_apart_by_one_unit_in_the_last_place_are_told_apart():
    one = torch.tensor(1.0, device=DEVICE)
    up = torch.nextafter(one, one + 1)
    weight = torch.stack([one, -up, one, -one]).repeat(5, 3)
    assert torch.equal(nm_mask(weight, 1, 4), (torch.arange(12, device=DEVICE) % 4 == 1).expand(5, 12))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="of the C path")
def test_every_entry_of_the_output_is_written(monkeypatch):
    poisoned = poison_new_memory(monkeypatch)
    for num_kept, group_size, transposable in (
        (2, 4, False),
        (2, 4, True),
        (3, 5, False),
        (1, 64, False),
        (8, 128, False),
    ):
        weight = torch.randn(12, group_size * 20)
        same(
            cpu.project(weight, num_kept, group_size, transposable),
            naive.project(weight, num_kept, group_size, transposable),
        )
        mask = cpu.nm_mask(weight, num_kept, group_size, transposable)
        assert torch.equal(mask.view(torch.uint8), (mask != 0).to(torch.uint8))
        assert torch.equal(mask, naive.nm_mask(weight, num_kept, group_size, transposable))
        values, indices = cpu.compress(weight, num_kept, group_size)
        assert torch.equal(indices, naive.compress(weight, num_kept, group_size)[1])
        assert not cpu.expand(values, indices, num_kept, group_size).isnan().any()
        assert {weight.shape, values.shape, indices.shape} <= set(poisoned)


def test_large_outputs_past_the_caches_are_the_same(monkeypatch):
    weight, grad, decay = torch.randn(64, 516), torch.randn(64, 516), torch.tensor([0.25])
    expected = [cpu.project(weight, 2, 4, t) for t in (False, True)]
    expected += [cpu.decayed_grad(grad, weight, decay, 2, 4, t) for t in (False, True)]
    monkeypatch.setattr(cpu, "_STREAMED_FROM_BYTES", 1)
    got = [cpu.project(weight, 2, 4, t) for t in (False, True)]
    got += [cpu.decayed_grad(grad, weight, decay, 2, 4, t) for t in (False, True)]
    for one, other in zip(got, expected, strict=True):
        same(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_threads_give_the_same(dtype, monkeypatch):
    weight = drawn((40, 4096), dtype)
    alone = nm_project(weight, 2, 4), nm_project(weight, transposable=True), *nm_compress(weight, 3, 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    together = nm_project(weight, 2, 4), nm_project(weight, transposable=True), *nm_compress(weight, 3, 8)
    for one, other in zip(alone, together, strict=True):
        same(one, other)


@pytest.mark.parametrize("transposable", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_straight_through_gradient(dtype, transposable):
    weight = drawn((8, 12), dtype).requires_grad_()
    upstream = drawn((8, 12), dtype)
    nm_project(weight, transposable=transposable).backward(upstream)
    same(weight.grad, upstream)


@pytest.mark.parametrize(("num_kept", "group_size", "transposable"), [(2, 4, False), (2, 4, True), (3, 5, False)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sr_ste_gradient_is_the_papers(dtype, num_kept, group_size, transposable):
    weight = drawn((8, 4 * group_size), dtype).requires_grad_()
    upstream = drawn((8, 4 * group_size), dtype)
    decay = torch.tensor([0.3], device=DEVICE, requires_grad=True)
    nm_project(weight, num_kept, group_size, decay=decay, transposable=transposable).backward(upstream)
    pruned = ~naive.nm_mask(weight, num_kept, group_size, transposable)
    # Equation 9 in fp64, then rounded: two roundings in fp32 may differ from one by a unit.
    expected = upstream.double() + decay.detach().double() * pruned * weight.detach().double()
    atol = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(weight.grad.double(), expected, rtol=torch.finfo(dtype).eps, atol=atol)
    same(weight.grad[~pruned], upstream[~pruned])
    assert decay.grad is None
    same(weight.grad, naive.decayed_grad(upstream, weight.detach(), decay.detach(), num_kept, group_size, transposable))


@pytest.mark.parametrize("transposable", [False, True])
def test_decay_of_fp64_weights_is_computed_in_fp64(transposable):
    weight = drawn((8, 12), torch.float64).requires_grad_()
    decay = torch.tensor([0.1], dtype=torch.float64, device=DEVICE)
    nm_project(weight, decay=decay, transposable=transposable).backward(torch.zeros_like(weight))
    pruned = ~nm_mask(weight, transposable=transposable)
    torch.testing.assert_close(weight.grad, torch.where(pruned, 0.1 * weight.detach(), 0.0), rtol=1e-15, atol=0)


def test_the_gradient_of_a_kept_infinity_is_clean():
    weight = torch.tensor([[float("inf"), 1.0, 2.0, float("nan")]], device=DEVICE, requires_grad=True)
    nm_project(weight, 2, 4, decay=torch.ones(1, device=DEVICE)).backward(torch.zeros(1, 4, device=DEVICE))
    assert weight.grad.tolist() == [[0.0, 1.0, 2.0, 0.0]]


def test_backward_takes_gradients_of_any_stride():
    weight = torch.randn(8, 12, device=DEVICE, requires_grad=True)
    decay, upstream = torch.tensor(0.5, device=DEVICE), torch.randn(12, 8, device=DEVICE).t()
    nm_project(weight, decay=decay).backward(upstream)
    same(weight.grad, naive.decayed_grad(upstream, weight.detach(), decay, 2, 4, False))
    weight.grad = None
    nm_project(weight, decay=decay).sum().backward()
    same(weight.grad, naive.decayed_grad(torch.ones_like(weight), weight.detach(), decay, 2, 4, False))


def test_decay_may_be_spent_by_the_first_backward():
    weight = torch.randn(12, 8, device=DEVICE, requires_grad=True)
    decay = torch.tensor([0.5], device=DEVICE)
    for out in [nm_project(weight, decay=decay, spend_decay=True) for _ in range(3)]:
        out.backward(torch.ones_like(weight))
    assert decay.item() == 0
    decay.fill_(0.5)
    expected = 2 + naive.decayed_grad(torch.ones_like(weight), weight.detach(), decay, 2, 4, False)
    torch.testing.assert_close(weight.grad, expected)


def test_nothing_but_references_is_kept_for_backward():
    weight = torch.randn(64, 64, device=DEVICE, requires_grad=True)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        nm_project(weight)
        assert not kept
        nm_project(weight, decay=torch.ones(1, device=DEVICE))
    assert {tensor.data_ptr() for tensor in kept if tensor.numel() > 1} == {weight.data_ptr()}


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,), (2, 0, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_weights(shape, dtype):
    weight = torch.empty(shape, device=DEVICE, dtype=dtype, requires_grad=True)
    assert nm_mask(weight).shape == shape
    out = nm_project(weight, decay=torch.ones(1, device=DEVICE))
    out.sum().backward()
    assert out.shape == weight.grad.shape == shape
    values, indices = nm_compress(weight)
    assert nm_expand(values, indices).shape == shape


def test_compressed_values_are_differentiable():
    weight = torch.randn(3, 16, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: nm_compress(w, 3, 8)[0], weight)
    values, indices = nm_compress(weight.detach(), 3, 8)
    assert torch.autograd.gradcheck(lambda v: nm_expand(v, indices, 3, 8), values.requires_grad_())
    weight = torch.randn(3, 16, device=DEVICE, requires_grad=True)
    nm_expand(*nm_compress(weight)).sum().backward()
    assert torch.equal(weight.grad, nm_mask(weight).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ops_are_registered_well(dtype):
    weight = torch.randn(8, 12, dtype=dtype, device=DEVICE, requires_grad=True)
    decay = torch.tensor([0.5], device=DEVICE)
    values, indices = nm_compress(weight.detach())
    for function, arguments in (
        (op._nm_mask, (weight, 2, 4, False)),
        (op._nm_project, (weight, None, 2, 4, False, False)),
        (op._nm_project, (weight.detach().t().contiguous().t(), decay, 2, 4, True, False)),
        (op._nm_project, (weight, decay, 2, 4, True, False)),
        (op._nm_decayed_grad, (values.new_ones(8, 12), weight.detach(), decay, 2, 4, False)),
        (op._nm_compress, (weight, 2, 4)),
        (op._nm_expand, (values.requires_grad_(), indices, 2, 4)),
    ):
        torch.library.opcheck(function, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_compiled_whole(dtype):
    def loss(weight, decay, upstream):
        total = (nm_project(weight, decay=decay) * upstream).sum()
        total = total + (nm_project(weight, transposable=True) * nm_mask(weight, 1, 4)).sum()
        return total + nm_expand(*nm_compress(weight)).float().square().sum().to(total.dtype)

    weight, upstream = drawn((8, 16), dtype), drawn((8, 16), dtype)
    decay = torch.tensor([0.5], device=DEVICE)
    grads = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaf = weight.clone().requires_grad_()
        function(leaf, decay, upstream).backward()
        grads.append(leaf.grad)
    same(grads[1], grads[0])


@pytest.mark.slow
def test_compiled_by_inductor():
    weight = torch.randn(8, 16, device=DEVICE, requires_grad=True)
    decay = torch.tensor([0.5], device=DEVICE)
    torch.compile(lambda w: nm_project(w * 2, decay=decay) + 1, fullgraph=True)(weight).sum().backward()
    same(weight.grad, 2 * naive.decayed_grad(torch.ones_like(weight), 2 * weight.detach(), decay, 2, 4, False))


def test_meta_weights_keep_their_shape():
    weight = torch.empty(4, 8, device="meta")
    assert nm_mask(weight).shape == nm_project(weight).shape == (4, 8)
    assert nm_mask(weight).dtype == torch.bool


def test_without_a_compiler_tensor_code_runs(monkeypatch):
    weight = torch.randn(8, 16)
    expected = nm_project(weight), *nm_compress(weight)
    monkeypatch.setattr(cpu.compiler, "load_library", lambda source: None)
    for got, want in zip((nm_project(weight), *nm_compress(weight)), expected, strict=True):
        same(got, want)


def test_semi_structured_needs_a_gpu():
    with pytest.raises(ValueError, match=r"weight \[64, 64\] on cpu has no semi-structured layout.*nm_compress"):
        to_semi_structured(torch.randn(64, 64))


@pytest.mark.gpu
def test_semi_structured_multiplies_as_the_projection():
    weight = torch.randn(128, 128, device="cuda", dtype=torch.bfloat16)
    rows = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16)
    sparse = to_semi_structured(weight)
    got = torch.nn.functional.linear(rows, sparse)
    torch.testing.assert_close(got, rows @ nm_project(weight).t(), rtol=2e-2, atol=0.5)
    with pytest.raises(ValueError, match=r"\[4, 4\]"):
        to_semi_structured(weight[:4, :4].contiguous())
