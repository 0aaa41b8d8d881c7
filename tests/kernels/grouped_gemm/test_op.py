"""The grouped product against its definition in fp64, every gradient, on every path."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from leanmill.kernels.grouped_gemm import blocks, cpu, library, naive, op
from leanmill.kernels.grouped_gemm.op import _product, grouped_gemm
from leanmill.kernels.grouped_gemm.problem import Needed, Problem
from tests.kernels.launcher import DEVICE, DTYPES, kernel_module


TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-12, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def drawn(
    counts, num_in, num_out, *, dtype=torch.float32, top_k=0, tail=0, gather=False, scatter=False, weighted=False
):
    """Operands with `counts` rows an expert and `tail` rows of nobody."""
    num_rows = sum(counts) + tail
    index = [torch.randperm(num_rows).view(-1, top_k) if used else None for used in (gather, scatter)]
    rows = torch.randn(num_rows // top_k if gather else num_rows, num_in).to(dtype)
    weight = torch.randn(len(counts), num_out, num_in).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    weights = torch.randn(num_rows // top_k, top_k, dtype=wide) if weighted else None
    return rows, weight, torch.tensor(counts).cumsum(0), *index, weights


def expected_of(operands, upstream):
    """Result and gradients of the definition in fp64, for the operands as rounded."""
    rows, weight, offsets, gather, scatter, weights = operands
    leaves = [None if t is None else t.detach().cpu().double().requires_grad_() for t in (rows, weight, weights)]
    gather, scatter = (None if t is None else t.cpu() for t in (gather, scatter))
    options = {"gather_index": gather, "scatter_index": scatter, "scatter_weights": leaves[2]}
    out = naive.grouped_gemm(leaves[0], leaves[1], offsets.cpu(), **options)
    out.backward(upstream.cpu().double())
    return out.detach(), *(None if t is None else t.grad for t in leaves)


def compare(got, expected, dtype):
    for one, other in zip(got, expected, strict=True):
        if other is None:
            assert one is None
            continue
        bound = TOLERANCES[dtype] * max(1.0, other.abs().max().item() if other.numel() else 1.0)
        torch.testing.assert_close(one.cpu().double(), other, rtol=0, atol=bound)


def by_path(path, operands, upstream):
    problem = Problem(*operands)
    found = path.backward(problem, upstream, Needed(True, True, operands[5] is not None))
    return path.forward(problem), found.rows, found.weight, found.scatter_weights


SHAPES = [
    ([3, 0, 5, 1, 0], 7, 9, 3, 0),
    ([0, 0], 4, 4, 2, 4),
    ([17], 33, 40, 1, 1),
    ([0, 100, 20, 0], 64, 24, 4, 0),
    ([2, 3], 5, 1, 5, 5),
]
ROUTINGS = [(False, False, False), (True, False, False), (False, True, True), (True, True, True), (False, True, False)]


def paths():
    yield blocks
    if cpu.library() is not None:
        yield cpu
    yield kernel_module("grouped_gemm")


@pytest.mark.parametrize("path", list(paths()), ids=lambda m: m.__name__.rsplit(".", 1)[-1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", ROUTINGS, ids=lambda r: "-".join(map(str, map(int, r))))
def test_result_and_gradients_on_every_path(path, dtype, routing):
    is_kernel = path.__name__.endswith("kernel")
    for counts, num_in, num_out, top_k, tail in SHAPES[:2] if is_kernel and DEVICE.type == "cpu" else SHAPES:
        gather, scatter, weighted = routing
        options = {"gather": gather, "scatter": scatter, "weighted": weighted}
        operands = drawn(counts, num_in, num_out, top_k=top_k, tail=tail, dtype=dtype, **options)
        num_out_rows = operands[4].shape[0] if scatter else sum(counts) + tail
        upstream = torch.randn(num_out_rows, num_out).to(dtype)
        if is_kernel:
            operands, upstream = [None if t is None else t.to(DEVICE) for t in operands], upstream.to(DEVICE)
        compare(by_path(path, operands, upstream), expected_of(operands, upstream), dtype)


@pytest.mark.parametrize("path", list(paths()), ids=lambda m: m.__name__.rsplit(".", 1)[-1])
@pytest.mark.parametrize(("gather", "scatter"), [(True, False), (False, True), (True, True)])
def test_copies_without_a_row_change_nothing(path, gather, scatter):
    """The same product with zeros stored for copies that no expert takes, and without."""
    counts, tail, weighted = [3, 0, 4], 5, scatter
    operands = drawn(counts, 7, 9, top_k=2, tail=tail, gather=gather, scatter=scatter, weighted=weighted)
    upstream = torch.randn(6 if scatter else 12, 9)
    device = DEVICE if path.__name__.endswith("kernel") else "cpu"
    rows, *rest = (None if t is None else t.to(device) for t in operands)
    kept = sum(counts)
    whole = by_path(path, (rows, *rest), upstream.to(device))
    problem = Problem(rows if gather else rows[:kept].contiguous(), *rest, num_kept=kept)
    part = upstream.to(device) if scatter else upstream[:kept].to(device)
    found = path.backward(problem, part, Needed(True, True, weighted))
    expected = [whole[0] if scatter else whole[0][:kept], whole[1] if gather else whole[1][:kept], *whole[2:]]
    for got, other in zip(
        (path.forward(problem), found.rows, found.weight, found.scatter_weights), expected, strict=True
    ):
        assert (got is None) == (other is None)
        assert got is None or torch.equal(got, other)


def test_torchs_own_kernel_takes_aligned_bf16():
    operands = drawn([8, 0, 24], 16, 32, top_k=2, gather=True, scatter=True, weighted=True, dtype=torch.bfloat16)
    upstream = torch.randn(16, 32).to(torch.bfloat16)
    operands, upstream = [t.to(DEVICE) for t in operands], upstream.to(DEVICE)
    assert library.is_supported(Problem(*operands))
    compare(by_path(library, operands, upstream), expected_of(operands, upstream), torch.bfloat16)
    odd = drawn([8], 15, 32, dtype=torch.bfloat16)
    assert not library.is_supported(Problem(*odd))


@pytest.mark.parametrize("most_rows", [1, 6, 20, 30])
def test_pieces_of_any_number_of_rows_are_the_whole(most_rows, monkeypatch):
    monkeypatch.setattr(blocks, "_PIECE_ROWS", most_rows)
    counts, dtype = [5, 0, 9, 1, 6, 0, 3], torch.bfloat16
    for gather, scatter in ((True, False), (False, True), (True, True)):
        options = {"gather": gather, "scatter": scatter, "weighted": scatter}
        operands = drawn(counts, 70, 130, top_k=2, tail=2, dtype=dtype, **options)
        upstream = torch.randn(13 if scatter else 26, 130).to(dtype)
        compare(by_path(blocks, operands, upstream), expected_of(operands, upstream), dtype)


def test_blocks_of_every_size_on_the_cpu():
    """Products larger than each of the C code's blocks, so that edges inside and at the end occur."""
    operands = drawn([1300, 5, 97], 523, 650, top_k=2, gather=True, scatter=True, weighted=True)
    upstream = torch.randn(701, 650)
    compare(by_path(cpu, operands, upstream), expected_of(operands, upstream), torch.float32)
    plain = drawn([1300, 5, 97], 523, 650)
    upstream = torch.randn(1402, 650)
    compare(by_path(cpu, plain, upstream), expected_of(plain, upstream), torch.float32)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(ROUTINGS),
    st.sampled_from([*DTYPES, torch.float64]),
    st.booleans(),
)
def test_drawn_shapes_and_strides(counts, num_in, num_out, routing, dtype, is_strided):
    gather, scatter, weighted = routing
    options = {"gather": gather, "scatter": scatter, "weighted": weighted}
    operands = drawn(counts, num_in, num_out, top_k=2, tail=sum(counts) % 2, dtype=dtype, **options)
    rows, weight, offsets, gather_index, scatter_index, weights = operands
    if is_strided:
        rows, weight = rows.t().contiguous().t(), weight.transpose(0, 2).contiguous().transpose(0, 2)
    leaves = [t if t is None else t.requires_grad_() for t in (rows, weight, weights)]
    out = grouped_gemm(
        rows, weight, offsets, gather_index=gather_index, scatter_index=scatter_index, scatter_weights=weights
    )
    assert out.dtype == dtype
    upstream = torch.randn(1).to(dtype).expand(out.shape)
    out.backward(upstream)
    compare([out.detach(), *(t if t is None else t.grad for t in leaves)], expected_of(operands, upstream), dtype)


def test_only_wanted_gradients_are_computed():
    rows, weight, offsets, *_ = drawn([3, 2], 4, 6)
    out = grouped_gemm(rows, weight.requires_grad_(), offsets)
    out.sum().backward()
    assert rows.grad is None
    assert weight.grad is not None
    out = grouped_gemm(rows.requires_grad_(), weight.detach(), offsets)
    out.sum().backward()
    assert rows.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats_bitwise_whatever_the_number_of_threads(dtype):
    operands = drawn([40, 0, 90, 70], 96, 160, top_k=4, gather=True, scatter=True, weighted=True, dtype=dtype)
    upstream = torch.randn(50, 160).to(dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 3, 1):
            torch.set_num_threads(num_threads)
            results.append(by_path(cpu, operands, upstream)[:3])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_every_element_is_written(monkeypatch):
    """Memory that products are written to is poisoned first."""

    def poisoned(like, *shape, dtype=None):
        return torch.full(shape, float("nan"), dtype=dtype or like.dtype)

    monkeypatch.setattr(cpu, "large_empty", poisoned)
    operands = drawn([0, 7, 0, 2], 11, 13, tail=3)
    upstream = torch.randn(12, 13)
    compare(by_path(cpu, operands, upstream), expected_of(operands, upstream), torch.float32)


def test_gradcheck_in_fp64():
    operands = drawn([2, 0, 4], 3, 2, top_k=2, gather=True, scatter=True, weighted=True, dtype=torch.float64)
    rows, weight, offsets, gather, scatter, weights = operands

    def function(r, w, s):
        return grouped_gemm(r, w, offsets, gather_index=gather, scatter_index=scatter, scatter_weights=s)

    assert torch.autograd.gradcheck(function, [t.double().requires_grad_() for t in (rows, weight, weights)])


def test_operator_keeps_the_rules_of_torch():
    operands = drawn([2, 0, 4], 3, 2, top_k=2, gather=True, scatter=True, weighted=True)
    torch.library.opcheck(_product, (*(t.requires_grad_() if t.is_floating_point() else t for t in operands), None))
    plain = drawn([2, 0, 4], 3, 2)
    torch.library.opcheck(_product, (plain[0].requires_grad_(), *plain[1:], None))


def test_compiles_whole():
    operands = drawn([2, 0, 4], 3, 2, top_k=2, gather=True, scatter=True, weighted=True)
    rows, weight, offsets, gather, scatter, weights = operands

    def function(r, w, s):
        product = grouped_gemm(r * 2, w, offsets, gather_index=gather, scatter_index=scatter, scatter_weights=s)
        return product.tanh()

    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (rows, weight, weights)]
        out = call(*leaves)
        out.sum().backward()
        results.append([out.detach(), *(t.grad for t in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_operator_knows_copies_without_a_row():
    rows, weight, offsets, gather, scatter, weights = drawn(
        [2, 0, 4], 3, 2, top_k=2, tail=4, gather=True, scatter=True, weighted=True
    )
    options = {"gather_index": gather, "num_rows": 6}
    torch.library.opcheck(_product, (rows.requires_grad_(), weight.requires_grad_(), offsets, gather, None, None, 6))
    hidden = grouped_gemm(rows, weight, offsets, **options)
    assert hidden.shape == (6, 2)
    back = weight.detach().transpose(1, 2).contiguous().requires_grad_()
    out = grouped_gemm(hidden, back, offsets, scatter_index=scatter, scatter_weights=weights, num_rows=6)
    assert out.shape == (5, 3)
    out.sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (rows, weight, back))


def test_checkpointing_does_not_repeat_the_product(monkeypatch):
    calls = []
    original = op._forward
    monkeypatch.setattr(op, "_forward", lambda *operands: calls.append(1) or original(*operands))
    rows, weight, offsets, *_ = drawn([3, 2], 4, 6)
    rows.requires_grad_(), weight.requires_grad_()
    out = checkpoint(lambda r: grouped_gemm(r, weight * 1.0, offsets), rows, use_reentrant=False)
    out.sum().backward()
    assert len(calls) == 1
    expected = expected_of((rows, weight, offsets, None, None, None), torch.ones(5, 6))
    compare([rows.grad, weight.grad], expected[1:3], torch.float32)


def test_wrong_input_is_refused_with_what_was_given():
    rows, weight, offsets, *_ = drawn([3, 3], 4, 6)
    index = torch.arange(6).view(3, 2)
    for changes, message in [
        ({"rows": rows[:, :3]}, r"\(6, 3\)"),
        ({"weight": weight[0]}, "E, out, in"),
        ({"weight": weight.bfloat16()}, "one dtype"),
        ({"rows": rows.int(), "weight": weight.int()}, "one dtype"),
        ({"offsets": offsets[:1]}, r"int64 \[2\]"),
        ({"offsets": torch.tensor([4, 3])}, "ascend"),
        ({"offsets": torch.tensor([3, 7])}, "at most 6"),
        ({"scatter_index": index[:2]}, "6 sorted rows"),
        ({"gather_index": index}, "as many tokens"),
        ({"gather_index": index.float()}, "gather_index must be int64"),
        ({"scatter_weights": torch.ones(3, 2)}, "scatter_index given"),
        ({"num_rows": 5}, "num_rows is 5"),
        ({"rows": rows[:3], "gather_index": index, "num_rows": 7}, "num_rows is 7"),
        ({"scatter_index": torch.arange(8).view(4, 2)}, "6 sorted rows"),
        ({"scatter_index": torch.zeros_like(index)}, "permutation"),
        ({"scatter_index": index + 1}, "permutation"),
    ]:
        arguments = {"rows": rows, "weight": weight, "offsets": offsets} | changes
        with pytest.raises(ValueError, match=message):
            grouped_gemm(**arguments)


def test_16_bit_products_are_rounded_once():
    operands = drawn([30, 34], 600, 8, dtype=torch.bfloat16)
    if cpu.library() is None:
        pytest.skip("no C compiler")
    wide = naive.grouped_gemm(operands[0].double(), operands[1].double(), operands[2])
    got = cpu.forward(Problem(*operands))
    assert ((got.double() - wide).abs() <= wide.abs() * 2**-8 + 1e-4).all()


@pytest.mark.parametrize("has_compiler", [False, True])
def test_autocast_does_not_change_the_dtype_of_products(monkeypatch, has_compiler):
    if not has_compiler:
        monkeypatch.setattr(cpu, "library", lambda: None)
    operands = drawn([30, 34], 64, 8)
    rows, weight, offsets = (t.requires_grad_() if t.is_floating_point() else t for t in operands[:3])
    with torch.autocast("cpu", torch.bfloat16):
        out = grouped_gemm(rows, weight, offsets)
        out.sum().backward()
    got = [out.detach(), rows.grad, weight.grad]
    compare(got, expected_of(operands, torch.ones(64, 8))[:3], torch.float32)
