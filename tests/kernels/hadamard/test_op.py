"""The Walsh-Hadamard transform and QuEST's quantiser against their formulas."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leanmill.kernels.hadamard import cpu, naive
from leanmill.kernels.hadamard.op import hadamard, hadamard_, quest_quantise


BLOCKS = [2**k for k in range(1, 13)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def sylvester(size):
    """H_2b = [[H, H], [H, -H]] / sqrt(2), the recursion itself."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / math.sqrt(2)
    return matrix


@pytest.mark.parametrize("block_size", [*BLOCKS[:10], 4096])
def test_equals_the_dense_matrix(block_size):
    x = torch.randn(3, 2 * block_size)
    matrix = sylvester(block_size)
    torch.testing.assert_close(naive.hadamard_matrix(block_size), matrix)
    expected = (x.double().unflatten(-1, (2, block_size)) @ matrix).flatten(-2)
    torch.testing.assert_close(hadamard(x, block_size).double(), expected, rtol=0, atol=3e-6)
    torch.testing.assert_close(hadamard(x.double(), block_size), expected)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(BLOCKS[:9]), st.integers(1, 3), st.sampled_from(DTYPES), st.booleans(), st.integers(0, 2**31))
def test_equals_the_definition_bit_for_bit(block_size, num_blocks, dtype, transposed, seed):
    torch.manual_seed(seed)
    shape = (3, num_blocks * block_size)
    x = (torch.randn(shape[::-1]).t() if transposed else torch.randn(shape)).to(dtype)
    assert torch.equal(hadamard(x, block_size), naive.hadamard(x, block_size))
    in_place = x.clone(memory_format=torch.preserve_format)
    assert hadamard_(in_place, block_size) is in_place
    assert torch.equal(in_place, naive.hadamard(x, block_size))


def test_special_numbers_stay_in_their_block():
    x = torch.randn(2, 64)
    x[0, 3], x[1, 40] = float("nan"), float("inf")
    found = hadamard(x, 32)
    assert found[0, :32].isnan().all()
    assert found[0, 32:].isfinite().all()
    assert found[1, :32].isfinite().all()
    assert found[1, 32:].isinf().all()


@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (2, 0, 16)])
def test_empty(shape):
    x = torch.empty(shape, requires_grad=True)
    hadamard(x).sum().backward()
    quest_quantise(x, 4).sum().backward()
    assert x.grad.shape == shape


def test_its_own_inverse_and_default_block():
    x = torch.randn(5, 96)
    torch.testing.assert_close(hadamard(hadamard(x)), x)
    assert torch.equal(hadamard(x), hadamard(x, 32))
    torch.testing.assert_close(hadamard(x).norm(), x.norm())


def test_gradients():
    x = torch.randn(2, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: hadamard(x, 16), x)
    assert torch.autograd.gradgradcheck(lambda x: hadamard(x, 16), x)
    x = torch.randn(4, 128, requires_grad=True)
    grad = torch.randn(4, 128)
    hadamard(x, 64).backward(grad)
    assert torch.equal(x.grad, naive.hadamard(grad, 64))
    with pytest.raises(ValueError, match="use hadamard"):
        hadamard_(x)


def test_shape_errors():
    x = torch.randn(3, 96)
    for block_size in (0, 1, 3, 64, 8192, -2):
        with pytest.raises(ValueError, match=r"\(3, 96\)"):
            hadamard(x, block_size)
    with pytest.raises(ValueError, match="pad it"):
        hadamard(torch.randn(3, 7))
    with pytest.raises(ValueError, match="int64"):
        hadamard(torch.arange(16))
    for num_bits in (0, 9, 1.585, True, "three"):
        with pytest.raises(ValueError, match="allowed: 1 to 8"):
            quest_quantise(x, num_bits, 32)


@pytest.mark.parametrize("num_bits", [1, 2, 3, 4, 8, "ternary"])
def test_clip_is_the_best_for_a_gaussian(num_bits):
    num_levels = 3 if num_bits == "ternary" else 2**num_bits
    # Quantiles of a Gaussian rather than a sample of one.
    x = torch.special.ndtri((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)

    def error(clip):
        step = 2 * clip / (num_levels - 1)
        index = ((x + clip) / step).round().clamp(0, num_levels - 1)
        return (index * step - clip - x).square().mean()

    clip = naive.CLIPS[num_levels]
    assert error(clip) < min(error(clip * 1.02), error(clip * 0.98))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("num_bits", "block_size"), [(1, 16), (2, 128), (4, 32), (8, 64), ("ternary", 16), (3, 2)])
def test_quest_by_its_formulas(num_bits, block_size, dtype):
    num_levels = 3 if num_bits == "ternary" else 2**num_bits
    x = torch.randn(6, 128, dtype=dtype, requires_grad=True)
    quantised = quest_quantise(x, num_bits, block_size)
    rotated = (x.detach().double().unflatten(-1, (-1, block_size)) @ sylvester(block_size)).flatten(-2)
    sigma = rotated.square().mean(-1, keepdim=True).sqrt()
    clip = naive.CLIPS[num_levels] * sigma
    levels = torch.stack([clip * (2 * i / (num_levels - 1) - 1) for i in range(num_levels)], dim=-1)
    nearest = (rotated.unsqueeze(-1) - levels).abs().min(-1)
    expected = levels.expand(*rotated.shape, -1).gather(-1, nearest.indices.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(quantised.detach().double(), expected, rtol=1e-5, atol=1e-5)
    trusted = nearest.values <= naive.CLIPS[num_levels] / (num_levels - 1) * sigma * (1 + 1e-6)
    grad = torch.randn_like(x)
    quantised.backward(grad)
    by_hand = ((trusted * grad.double()).unflatten(-1, (-1, block_size)) @ sylvester(block_size)).flatten(-2)
    torch.testing.assert_close(x.grad.double(), by_hand, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quest_equals_the_definition(dtype):
    for block_size, length, num_bits in itertools.product((2, 4, 32, 256), (256, 768), (1, 2, 5, "ternary")):
        num_levels = 3 if num_bits == "ternary" else 2**num_bits
        x = torch.randn(4, length).to(dtype)
        found = torch.ops.leanmill.quest_quantise(x, num_levels, block_size)
        expected = naive.quest_quantise(x, num_levels, block_size)
        assert found[0].dtype == dtype
        torch.testing.assert_close(found[0], expected[0], rtol=1e-6 if dtype == torch.float32 else 0.01, atol=0)
        assert torch.equal(found[1], expected[1])


def test_quest_of_zeros_ties_and_special_numbers():
    x = torch.zeros(4, 16)
    x[1, 0], x[2, 0] = float("nan"), float("inf")
    x[3] = 1.0
    for num_bits in (1, 2, "ternary"):
        quantised = quest_quantise(x, num_bits)
        assert torch.equal(quantised[0], torch.zeros(16))
        assert quantised[1].isnan().all()
        assert not quantised[2].isfinite().any() or quantised[2].isnan().any()
        # All of a constant row is in its first transformed entry; the others are zeros, on an edge of levels.
        assert quantised[3, 0] > 0
        sigma = naive.CLIPS[3 if num_bits == "ternary" else 2**num_bits]
        step = 2 * sigma / (2 if num_bits == "ternary" else 2**num_bits - 1)
        expected = torch.full((15,), 0.0 if num_bits == "ternary" else step / 2)
        torch.testing.assert_close(quantised[3, 1:], expected)


def test_long_rows_on_several_threads_are_repeatable():
    threads = torch.get_num_threads()
    x = torch.randn(65, 1024)
    one = quest_quantise(x, 4), hadamard(x)
    torch.set_num_threads(3)
    try:
        several = quest_quantise(x, 4), hadamard(x)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, one, several))


def test_without_a_compiler(monkeypatch):
    x = torch.randn(3, 64)
    expected = hadamard(x), quest_quantise(x, 3)
    monkeypatch.setattr(cpu, "library", lambda: None)
    torch.testing.assert_close((hadamard(x), quest_quantise(x, 3)), expected)


def test_inside_compiled_code_and_by_the_rules_of_operators():
    def function(x):
        return (quest_quantise(x, 4, 16) * hadamard(x, 32)).sum()

    x = torch.randn(4, 64, requires_grad=True)
    torch.compile(function, fullgraph=True, backend="aot_eager")(x).backward()
    found, x.grad = x.grad, None
    function(x).backward()
    torch.testing.assert_close(found, x.grad)
    torch.library.opcheck(torch.ops.leanmill.hadamard, (x, 16))
    torch.library.opcheck(torch.ops.leanmill.hadamard_, (x.detach().clone(), 16))
    torch.library.opcheck(torch.ops.leanmill.quest_quantise, (x, 4, 16))
    torch.library.opcheck(torch.ops.leanmill.masked_hadamard, (x, x.detach() > 0, 16))
