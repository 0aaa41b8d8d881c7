"""Permutation by expert: the sort against Python's, both moves against loops and autograd, on every path."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leanmill.kernels.moe_permute import cpu, naive
from leanmill.kernels.moe_permute.op import (
    _combine,
    _sort_by_expert,
    _spread,
    moe_permute,
    moe_unpermute,
    order_of_positions,
    sort_by_expert,
    spread_rows,
)
from tests.kernels.launcher import DEVICE, DTYPES, kernel_module


SIZES = [(1, 1, 1), (7, 3, 5), (150, 2, 3), (67, 4, 40), (0, 2, 3)]


def by_hand(index, num_experts):
    """Sort copies by (expert, copy) with Python's sort."""
    experts = index.reshape(-1).tolist()
    order = sorted(range(len(experts)), key=lambda copy: (experts[copy], copy))
    return order, [experts.count(e) for e in range(num_experts)]


def paths():
    yield naive
    if cpu.library() is not None:
        yield cpu
    yield kernel_module("moe_permute")


@pytest.mark.parametrize("path", list(paths()), ids=lambda m: m.__name__.rsplit(".", 1)[-1])
@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts"), SIZES)
def test_sort_is_stable_counts_and_puts_copies_of_no_expert_last(path, num_tokens, top_k, num_experts):
    index = torch.randint(num_experts + 1, (num_tokens, top_k))
    device = DEVICE if path.__name__.endswith("kernel") else "cpu"
    order, positions, counts = (t.cpu() for t in path.sort_by_expert(index.to(device), num_experts))
    expected_order, expected_counts = by_hand(index, num_experts)
    assert order.tolist() == expected_order
    assert counts.tolist() == expected_counts
    assert positions.shape == index.shape
    assert torch.equal(order[positions.reshape(-1)], torch.arange(index.numel()))


def test_sort_in_pieces_on_many_threads_equals_the_sort_in_one(monkeypatch):
    index = torch.randint(8, (500, 4))
    whole = cpu.sort_by_expert(index, 8)
    monkeypatch.setattr(cpu, "_GRAIN_COPIES", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for got, expected in zip(cpu.sort_by_expert(index, 8), whole, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("path", list(paths()), ids=lambda m: m.__name__.rsplit(".", 1)[-1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_weighted", [False, True])
def test_moves_equal_loops(path, dtype, is_weighted):
    device = DEVICE if path.__name__.endswith("kernel") else "cpu"
    num_tokens, top_k, width = 5, 3, 19
    positions = torch.randperm(num_tokens * top_k).view(num_tokens, top_k)
    rows, tokens = torch.randn(15, width).to(dtype), torch.randn(num_tokens, width).to(dtype)
    weights = torch.randn(num_tokens, top_k) if is_weighted else None
    combined, spread = torch.zeros(num_tokens, width), torch.full((15, width), float("nan"))
    products = torch.zeros(num_tokens, top_k)
    for t in range(num_tokens):
        for k in range(top_k):
            factor = weights[t, k] if is_weighted else 1.0
            combined[t] += factor * rows[positions[t, k]].float()
            spread[positions[t, k]] = factor * tokens[t].float()
            products[t, k] = rows[positions[t, k]].float() @ tokens[t].float()
    on = [t if t is None else t.to(device) for t in (rows, tokens, positions, weights)]
    rows, tokens, positions, weights = on
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(path.combine(rows, positions, weights).float().cpu(), combined, **tolerance)
    torch.testing.assert_close(path.spread(tokens, positions, weights).float().cpu(), spread, **tolerance)
    torch.testing.assert_close(path.dots(rows, positions, tokens).float().cpu(), products, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", list(paths()), ids=lambda m: m.__name__.rsplit(".", 1)[-1])
@pytest.mark.parametrize("num_rows", [0, 4])
def test_copies_without_a_row_count_as_zero(path, num_rows):
    device = DEVICE if path.__name__.endswith("kernel") else "cpu"
    positions, weights = torch.randperm(6).view(3, 2).to(device), torch.randn(3, 2).to(device)
    tokens, rows = torch.randn(3, 5).to(device), torch.randn(num_rows, 5).to(device)
    padded = torch.cat([rows, rows.new_zeros(6 - num_rows, 5)])
    assert torch.equal(
        path.spread(tokens, positions, weights, num_rows), path.spread(tokens, positions, weights)[:num_rows]
    )
    assert torch.equal(path.combine(rows, positions, weights), path.combine(padded, positions, weights))
    assert torch.equal(path.dots(rows, positions, tokens), path.dots(padded, positions, tokens))


def test_spread_rows_leaves_out_the_copies_of_no_expert():
    index = torch.tensor([[0, 2], [2, 1], [2, 2]])
    order, positions, counts = sort_by_expert(index, 2)
    tokens = torch.randn(3, 4, requires_grad=True)
    rows = spread_rows(tokens, positions, int(counts.sum()))
    assert torch.equal(rows, tokens[order[:2] // 2])
    moe_unpermute(rows, positions).sum().backward()
    assert torch.equal(tokens.grad, torch.tensor([[1.0], [1.0], [0.0]]).expand(3, 4))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 12), st.integers(1, 4), st.integers(1, 6), st.integers(1, 40), st.booleans())
def test_gradients_equal_those_of_the_definition(num_tokens, top_k, num_experts, width, is_transposed):
    index = torch.randint(num_experts, (num_tokens, top_k))
    x = (torch.randn(width, num_tokens).t() if is_transposed else torch.randn(num_tokens, width)).requires_grad_()
    weights = torch.randn(num_tokens, top_k, requires_grad=True)
    permuted = moe_permute(x, index, num_experts)
    assert torch.equal(permuted.rows, x[permuted.order // top_k])
    out = moe_unpermute(permuted.rows * 2, permuted.positions, weights)
    twin, twin_weights = x.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    expected = naive.combine(naive.spread(twin, permuted.positions) * 2, permuted.positions, twin_weights)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream.double())
    torch.testing.assert_close(x.grad.double(), twin.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(weights.grad.double(), twin_weights.grad, rtol=1e-5, atol=1e-4)


def test_gradcheck_in_fp64():
    positions = torch.randperm(8).view(4, 2)
    weights = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r, w: moe_unpermute(r, positions, w), (rows, weights))
    assert torch.autograd.gradcheck(lambda t, w: _spread(t, positions, w, None), (tokens, weights))


def test_operators_keep_the_rules_of_torch():
    positions = torch.randperm(8).view(4, 2)
    weights = torch.randn(4, 2, requires_grad=True)
    torch.library.opcheck(_combine, (torch.randn(8, 3, requires_grad=True), positions, weights))
    torch.library.opcheck(_spread, (torch.randn(4, 3, requires_grad=True), positions, weights, 5))
    torch.library.opcheck(_sort_by_expert, (torch.randint(3, (4, 2)), 3))


def test_compiles_whole():
    index = torch.randint(3, (6, 2))

    def there_and_back(x):
        permuted = moe_permute(x, index, 3)
        return moe_unpermute(permuted.rows.tanh(), permuted.positions)

    x, twin = (torch.arange(24.0).view(6, 4).requires_grad_() for _ in range(2))
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")(x)
    compiled.sum().backward()
    there_and_back(twin).sum().backward()
    assert torch.equal(compiled, there_and_back(twin))
    assert torch.equal(x.grad, twin.grad)


def test_wrong_input_is_refused_with_what_was_given():
    x, index = torch.randn(4, 3), torch.randint(3, (4, 2))
    with pytest.raises(ValueError, match=r"0 \.\. 2"):
        sort_by_expert(torch.full((4, 2), 4), 3)
    with pytest.raises(ValueError, match="int64"):
        sort_by_expert(index.float(), 3)
    with pytest.raises(ValueError, match="at least 1"):
        sort_by_expert(index, 0)
    with pytest.raises(ValueError, match=r"\(3, 3\)"):
        moe_permute(x[:3], index, 3)
    with pytest.raises(ValueError, match=r"\[8, H\]"):
        moe_unpermute(torch.randn(9, 3), index)
    with pytest.raises(ValueError, match="num_rows is 9"):
        spread_rows(x, index, 9)
    with pytest.raises(ValueError, match="shape of positions"):
        moe_unpermute(torch.randn(8, 3), torch.arange(8).view(4, 2), torch.randn(4, 3))
    with pytest.raises(ValueError, match="permutation"):
        order_of_positions(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="permutation"):
        moe_unpermute(torch.randn(8, 3), torch.full((4, 2), 8))
