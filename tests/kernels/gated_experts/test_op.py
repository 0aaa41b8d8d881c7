"""Gated experts against their definition in fp64, every gradient, on every path."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from leanmill.kernels.gated_experts import cpu, naive, op, products
from leanmill.kernels.gated_experts.experts import Experts, Needed
from leanmill.kernels.gated_experts.op import _experts, gated_experts
from leanmill.kernels.grouped_gemm import cpu as product
from leanmill.kernels.moe_permute.op import sort_by_expert
from tests.kernels.launcher import DTYPES


TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-12, torch.float16: 4e-3, torch.bfloat16: 2e-2}
has_c = pytest.mark.skipif(product.library() is None, reason="no C compiler")


def drawn(index, num_experts, hidden, width, *, dtype=torch.float32, num_rows=None):
    """Operands for tokens that choose the experts of `index` [T, K]."""
    _, positions, counts = sort_by_expert(index, num_experts)
    tokens = torch.randn(index.shape[0], hidden).to(dtype)
    gate_up = (torch.randn(num_experts, 2 * width, hidden) / hidden**0.5).to(dtype)
    down = (torch.randn(num_experts, hidden, width) / width**0.5).to(dtype)
    weights = torch.randn(index.shape, dtype=torch.promote_types(dtype, torch.float32))
    return tokens, gate_up, down, counts.cumsum(0), positions, weights, num_rows


def distinct(num_tokens, num_experts, top_k):
    return torch.rand(num_tokens, num_experts).topk(top_k).indices


ROUTINGS = {
    "odd": lambda: (distinct(13, 5, 3), 5, 7, 9),
    "blocks": lambda: (distinct(700, 4, 2), 4, 131, 301),
    "empty experts": lambda: (distinct(20, 3, 2) * 2, 6, 16, 33),
    "one expert takes all": lambda: (torch.full((150, 1), 2), 4, 24, 40),
    "one token": lambda: (distinct(1, 8, 2), 8, 32, 64),
    "no token": lambda: (torch.zeros(0, 2, dtype=torch.int64), 3, 8, 8),
    "nobody's copies": lambda: (torch.randint(0, 5, (30, 2)), 4, 10, 12),
}


def leaves_of(operands, dtype=torch.float64):
    return [t.detach().to(dtype).requires_grad_() for t in (*operands[:3], operands[5])]


def expected_of(operands, upstream):
    """Result and gradients of the definition in fp64, for the operands as rounded."""
    tokens, gate_up, down, weights = leaves = leaves_of(operands)
    out = naive.gated_experts(tokens, gate_up, down, operands[3], operands[4], weights, operands[6])
    out.backward(upstream.double())
    return out.detach(), *(t.grad for t in leaves)


def by_path(path, operands, upstream):
    experts = Experts(*operands)
    kept, hidden = path.up(experts, keep=True)
    found = path.backward(experts, kept, upstream, Needed())
    return path.down(experts, hidden), found.tokens, found.gate_up, found.down, found.weights


def compare(got, expected, dtype):
    for one, other in zip(got, expected, strict=True):
        bound = TOLERANCES[dtype] * max(1.0, other.abs().max().item() if other.numel() else 1.0)
        torch.testing.assert_close(one.double(), other, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("path", [pytest.param(cpu, marks=has_c), products], ids=["cpu", "products"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_result_and_gradients_on_every_path(path, dtype, routing):
    if path is cpu and dtype == torch.float64:
        pytest.skip("the C code covers fp32 and narrower")
    operands = drawn(*ROUTINGS[routing](), dtype=dtype)
    upstream = torch.randn(operands[0].shape).to(dtype)
    compare(by_path(path, operands, upstream), expected_of(operands, upstream), dtype)


@pytest.mark.parametrize("path", [pytest.param(cpu, marks=has_c), products], ids=["cpu", "products"])
def test_copies_without_a_row_change_nothing(path):
    index, *shape = ROUTINGS["nobody's copies"]()
    operands = drawn(index, *shape)
    upstream = torch.randn(operands[0].shape)
    whole = by_path(path, operands, upstream)
    part = by_path(path, (*operands[:6], int(operands[3][-1])), upstream)
    assert all(torch.equal(a, b) for a, b in zip(whole, part, strict=True))


@pytest.mark.parametrize("wanted", range(16))
def test_only_wanted_gradients_are_computed(wanted):
    operands = drawn(*ROUTINGS["odd"]())
    leaves = leaves_of(operands, torch.float32)
    for place, leaf in enumerate(leaves):
        leaf.requires_grad_(bool(wanted >> place & 1))
    tokens, gate_up, down, weights = leaves
    out = gated_experts(tokens, gate_up, down, *operands[3:5], weights)
    assert out.requires_grad == bool(wanted)
    upstream = torch.randn(out.shape)
    expected = expected_of(operands, upstream)
    compare([out], expected[:1], torch.float32)
    if not wanted:
        return
    out.backward(upstream)
    for leaf, other in zip(leaves, expected[1:], strict=True):
        assert (leaf.grad is not None) == leaf.requires_grad
        if leaf.grad is not None:
            compare([leaf.grad], [other], torch.float32)


@has_c
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats_bitwise_whatever_the_number_of_threads(dtype):
    operands = drawn(distinct(90, 4, 2), 4, 96, 160, dtype=dtype)
    upstream = torch.randn(operands[0].shape).to(dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 3, 1):
            torch.set_num_threads(num_threads)
            results.append(by_path(cpu, operands, upstream))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@has_c
def test_every_element_is_written(monkeypatch):
    """Memory that results are written to is poisoned first."""

    def poisoned(like, *shape, dtype=None):
        return torch.full(shape, float("nan"), dtype=dtype or like.dtype)

    for module in (cpu, product):
        monkeypatch.setattr(module, "large_empty", poisoned)
    for routing in ("empty experts", "nobody's copies"):
        operands = drawn(*ROUTINGS[routing]())
        upstream = torch.randn(operands[0].shape)
        compare(by_path(cpu, operands, upstream), expected_of(operands, upstream), torch.float32)


def test_gradcheck_in_fp64():
    operands = drawn(distinct(4, 3, 2), 3, 3, 2, dtype=torch.float64)

    def function(tokens, gate_up, down, weights):
        return gated_experts(tokens, gate_up, down, *operands[3:5], weights)

    assert torch.autograd.gradcheck(function, leaves_of(operands))


def test_operator_keeps_the_rules_of_torch():
    for num_rows in (None, 24):
        operands = drawn(*(ROUTINGS["odd"] if num_rows is None else ROUTINGS["nobody's copies"])())
        num_rows = num_rows and int(operands[3][-1])
        tokens, gate_up, down, weights = leaves_of(operands, torch.float32)
        torch.library.opcheck(_experts, (tokens, gate_up, down, *operands[3:5], weights, num_rows, True))


def test_compiles_whole_and_equals_eager():
    operands = drawn(*ROUTINGS["odd"]())

    def function(tokens, gate_up, down, weights):
        return gated_experts(tokens * 2, gate_up, down, *operands[3:5], weights).tanh()

    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = leaves_of(operands, torch.float32)
        out = call(*leaves)
        out.sum().backward()
        results.append([out.detach(), *(t.grad for t in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_checkpointing_does_not_repeat_the_second_product(monkeypatch):
    path, calls = op._path(Experts(*drawn(*ROUTINGS["odd"]()))), []
    original = path.down
    monkeypatch.setattr(path, "down", lambda *operands: calls.append(1) or original(*operands))
    operands = drawn(*ROUTINGS["odd"]())
    tokens, gate_up, down, weights = leaves = leaves_of(operands, torch.float32)
    run = lambda t: gated_experts(t, gate_up * 1.0, down * 1.0, *operands[3:5], weights)  # noqa: E731
    out = checkpoint(run, tokens, use_reentrant=False)
    upstream = torch.randn(out.shape)
    out.backward(upstream)
    assert len(calls) == 1
    compare([out.detach(), *(t.grad for t in leaves)], expected_of(operands, upstream), torch.float32)


def test_only_operands_and_the_rows_of_gate_and_up_are_kept():
    operands = drawn(*ROUTINGS["blocks"]())
    leaves, kept = leaves_of(operands, torch.float32), []
    tokens, gate_up, down, weights = leaves
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated_experts(tokens, gate_up, down, *operands[3:5], weights)
    given = {t.data_ptr() for t in (*operands[3:5], *leaves)}
    fresh = [t.shape for t in kept if t.data_ptr() not in given]
    assert fresh == [(1400, 602)]


def test_autocast_does_not_change_the_dtype_of_products():
    operands = drawn(*ROUTINGS["odd"]())
    tokens, gate_up, down, weights = leaves_of(operands, torch.float32)
    plain = gated_experts(tokens, gate_up, down, *operands[3:5], weights)
    with torch.autocast("cpu", torch.bfloat16):
        out = gated_experts(tokens, gate_up, down, *operands[3:5], weights)
        assert torch.equal(out, plain)
        out.sum().backward()
    assert tokens.grad.dtype == torch.float32


class Sharded(torch.Tensor):
    """What tells a DTensor from a plain tensor, without a process group."""

    @staticmethod
    def __new__(cls, tensor):
        return tensor.as_subclass(cls)

    placements = device_mesh = ()


def test_wrong_input_is_refused_with_what_was_given():
    operands = drawn(*ROUTINGS["odd"]())
    names = ("tokens", "gate_up", "down", "offsets", "positions", "weights")
    given = dict(zip(names, operands, strict=False))
    for changes, message in [
        ({"tokens": given["tokens"][:, :3]}, r"\(13, 3\)"),
        ({"tokens": given["tokens"].bfloat16()}, "one dtype"),
        ({"gate_up": given["gate_up"][:, 1:]}, r"\[E, 2I, H\]"),
        ({"down": given["down"].transpose(1, 2)}, r"\[E, H, I\]"),
        ({"down": given["down"].double()}, "float64"),
        ({"weights": given["weights"][:, :1]}, "must have the shape of"),
        ({"weights": given["weights"].to("meta")}, "is on meta"),
        ({"weights": Sharded(given["weights"])}, "is a DTensor"),
        ({"down": Sharded(given["down"])}, "down is a DTensor"),
        ({"offsets": given["offsets"].flip(0)}, "ascend"),
        ({"positions": given["positions"] + 1}, "permutation"),
        ({"num_rows": 40}, "num_rows is 40"),
    ]:
        with pytest.raises(ValueError, match=message):
            gated_experts(**(given | changes))
