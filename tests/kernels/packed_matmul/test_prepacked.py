"""Weights in the layout of torch's CPU kernels against unpacked ones in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leanmill.kernels.native.processor import multiplies_natively
from leanmill.kernels.packed_matmul import cpu, prepacked
from leanmill.kernels.packed_matmul.op import packed_matmul
from leanmill.kernels.packed_matmul.prepacked import MOST_TORCH_TOKENS, prepack, prepacked_matmul
from leanmill.kernels.packing.op import pack


TOKENS = [1, 2, 3, 5, 7, 16, 17, 33]


def assert_is_product(found, x, weight):
    """Sums in fp32, one rounding to the dtype of x; on bf16 instructions one of the weight besides."""
    expected = x.double() @ weight.t()
    sums = x.double().abs() @ weight.abs().t()
    is_rounded = x.dtype == torch.bfloat16 and x.shape[0] > cpu.MOST_BLOCK_TOKENS and multiplies_natively(x.dtype)
    allowed = expected.abs() * torch.finfo(x.dtype).eps + sums * (2**-8 if is_rounded else 1e-5)
    assert ((found.double() - expected).abs() <= allowed).all()


def four_bits(num_rows, length, group_size, zeros):
    """Return codes, bf16 scales, and the weight that torch's definition gives in fp64."""
    codes = torch.randint(0, 16, (num_rows, length))
    scales = (torch.rand(num_rows, length // group_size) / 8).bfloat16()
    offsets = ((8 - zeros) * scales.float()).bfloat16().expand_as(scales)
    wide = [values.double().repeat_interleave(group_size, 1) for values in (scales, offsets)]
    return codes, scales, (codes.double() - 8) * wide[0] + wide[1]


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(TOKENS),
    st.sampled_from([16, 32, 48, 80]),
    st.sampled_from([(64, 32), (96, 32), (96, 96), (320, 64), (256, 128), (512, 256), (512, 512), (1024, 512)]),
    st.integers(0, 2**31),
)
def test_four_bits(num_tokens, num_rows, sizes, seed):
    torch.manual_seed(seed)
    length, group_size = sizes
    zeros = torch.rand(num_rows, length // group_size) * 15
    codes, scales, expected = four_bits(num_rows, length, group_size, zeros)
    weight = prepack(pack(codes, 4), scales, 4, zero_points=zeros)
    x = torch.randn(num_tokens, length).bfloat16()
    assert_is_product(prepacked_matmul(x, weight), x, expected)


@pytest.mark.parametrize("num_tokens", [1, 40])
@pytest.mark.parametrize("zero", [None, 8, 7, 4, 0, 8.5, 9.0])
def test_zero_points_a_power_of_two_from_the_middle_are_exact(zero, num_tokens):
    codes, scales, _ = four_bits(16, 128, 32, torch.tensor(8.0))
    by_definition = (codes - (8 if zero is None else zero)) * scales.double().repeat_interleave(32, 1)
    weight = prepack(pack(codes, 4), scales, 4, zero_points=zero)
    # The identity reads the weight itself; its entries need more bits than bf16 has.
    x = torch.eye(128).bfloat16()[:num_tokens]
    assert torch.equal(prepacked_matmul(x, weight), by_definition.t()[:num_tokens].bfloat16())


def test_rounding_of_other_scales_and_zero_points_stays_in_its_bound():
    codes, zeros = torch.randint(0, 16, (16, 64)), torch.rand(16, 2) * 15
    scales = torch.rand(16, 2) / 8
    weight = prepack(pack(codes, 4), scales, 4, zero_points=zeros)
    rounded = scales.bfloat16().float()
    by_definition = packed_matmul(torch.eye(64), pack(codes, 4), rounded, 4, zero_points=zeros)
    bound = (rounded * 2**-8 * (8 - zeros).abs()).repeat_interleave(32, 1).t()
    assert ((prepacked_matmul(torch.eye(64), weight) - by_definition).abs() <= bound * 1.01 + 1e-6).all()


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(TOKENS), st.sampled_from([4, 12, 16, 36]), st.sampled_from([16, 48, 64, 528]), st.integers(0, 2**31)
)
def test_eight_bits(num_tokens, num_rows, length, seed):
    torch.manual_seed(seed)
    codes, scales = torch.randint(0, 256, (num_rows, length)), (torch.rand(num_rows) / 100).bfloat16()
    x = torch.randn(num_tokens, length).bfloat16()
    weight = prepack(pack(codes, 8), scales, 8, zero_points=128)
    assert_is_product(prepacked_matmul(x, weight), x, (codes.double() - 128) * scales.double()[:, None])


@pytest.mark.parametrize("num_bits", [4, 8])
def test_groups_without_a_scale_and_one_scale_for_all(num_bits):
    codes = torch.randint(0, 2**num_bits, (16, 64))
    x = torch.randn(3, 64).bfloat16()
    assert not prepacked_matmul(x, prepack(pack(codes, num_bits), torch.tensor(0.0), num_bits)).any()
    weight = prepack(pack(codes, num_bits), torch.tensor(0.25), num_bits)
    for tokens in (x, x.repeat(10, 1)):
        assert_is_product(prepacked_matmul(tokens, weight), tokens, (codes.double() - 2 ** (num_bits - 1)) * 0.25)
    zeros = torch.full((16, 2), 3.0)
    if num_bits == 4:
        nothing = prepack(pack(codes, 4), torch.zeros(16, 2), 4, zero_points=zeros)
        assert not prepacked_matmul(x, nothing).any()
        assert not prepacked_matmul(x.float(), nothing).any()


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_other_dtypes(dtype, num_bits):
    codes, scales = torch.randint(0, 2**num_bits, (16, 64)), torch.full((16,), 2.0**-7)
    weight = prepack(pack(codes, num_bits), scales, num_bits)
    x = torch.randn(5, 64).to(dtype)
    found = prepacked_matmul(x, weight)
    assert found.dtype == dtype
    assert_is_product(found, x, (codes.double() - 2 ** (num_bits - 1)) * 2.0**-7)


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("num_tokens", [3, MOST_TORCH_TOKENS + 1])
def test_strides_alignment_and_empty_inputs(num_bits, num_tokens):
    codes = torch.randint(0, 2**num_bits, (16, 64))
    weight = prepack(pack(codes, num_bits), torch.full((16,), 2.0**-7), num_bits)
    dense = (codes.double() - 2 ** (num_bits - 1)) * 2.0**-7
    across = torch.randn(64, num_tokens).bfloat16().t()
    # Torch's int8 kernel ends the process on rows that do not start at a vector's boundary.
    unaligned = torch.randn(num_tokens * 64 + 1).bfloat16()[1:].view(num_tokens, 64)
    for x in (across, unaligned):
        assert_is_product(prepacked_matmul(x, weight), x, dense)
    batched = prepacked_matmul(unaligned.view(1, num_tokens, 64), weight)
    assert torch.equal(batched[0], prepacked_matmul(unaligned, weight))
    assert prepacked_matmul(unaligned[:0], weight).shape == (0, 16)


@pytest.mark.parametrize("num_bits", [4, 8])
def test_the_rule_picks_by_dtype_and_tokens(num_bits, monkeypatch):
    codes = torch.randint(0, 2**num_bits, (16, 64))
    weight = prepack(pack(codes, num_bits), torch.full((16,), 2.0**-7), num_bits)
    calls = []
    name = {4: "_weight_int4pack_mm_for_cpu", 8: "_weight_int8pack_mm"}[num_bits]
    kernel = getattr(torch, name)
    monkeypatch.setattr(torch, name, lambda *arguments: calls.append(arguments[0].shape[0]) or kernel(*arguments))
    for num_tokens in (1, MOST_TORCH_TOKENS, MOST_TORCH_TOKENS + 1):
        prepacked_matmul(torch.randn(num_tokens, 64).bfloat16(), weight)
    prepacked_matmul(torch.randn(2, 64), weight)
    prepacked_matmul(torch.randn(2, 64).half(), weight)
    assert calls == [1, MOST_TORCH_TOKENS]


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("num_tokens", [2, 20])
def test_inside_compiled_code_and_by_the_rules_of_operators(num_bits, num_tokens):
    codes = torch.randint(0, 2**num_bits, (16, 64))
    weight = prepack(pack(codes, num_bits), torch.full((16,), 2.0**-7), num_bits)
    x = torch.randn(num_tokens, 64).bfloat16()
    compiled = torch.compile(lambda x: prepacked_matmul(x, weight), fullgraph=True, backend="aot_eager")
    expected = prepacked_matmul(x, weight)
    assert torch.equal(compiled(x), expected)
    assert torch.equal(prepacked_matmul(x, weight), expected)
    torch.library.opcheck(torch.ops.leanmill.prepacked_matmul, (x, *weight[1:], num_bits))


def test_weights_that_torch_does_not_take(monkeypatch):
    four, eight = torch.zeros(16, 32, dtype=torch.uint8), torch.zeros(16, 64, dtype=torch.uint8)
    scales = torch.ones(16, 2)
    for packed, some, num_bits, message in (
        (four, scales, 2, "num_bits 2"),
        (four[:8], scales[:8], 4, r"\[8, 64\]"),
        (four[:, :24], scales[:, :1], 4, r"\[16, 48\]"),
        (four, torch.ones(16, 4), 4, "groups of 16"),
        (four, torch.ones(16, 3), 4, r"scales \(16, 3\)"),
        (four.int(), scales, 4, "int32"),
        (four[0], scales, 4, r"\(32,\)"),
        (four, scales.int(), 4, "scales torch.int32"),
        (four.to("meta"), scales, 4, "meta"),
        (four[:0], scales[:0], 4, r"\[0, 64\]"),
        (eight[:7], scales[:7, :1], 8, r"\[7, 64\]"),
        (eight[:, :24], scales[:, :1], 8, r"\[16, 24\]"),
        (eight, scales, 8, r"scales \(16, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            prepack(packed, some, num_bits)
    with pytest.raises(ValueError, match="zero_points 3"):
        prepack(eight, scales[:, 0], 8, zero_points=3)
    with pytest.raises(ValueError, match=r"zero_points \(16, 3\)"):
        prepack(four, scales, 4, zero_points=torch.ones(16, 3))
    monkeypatch.setattr(prepacked, "_MOST_CODES", 16 * 64)
    with pytest.raises(ValueError, match="between 1 and 1023"):
        prepack(four, scales, 4)


def test_activations_that_do_not_fit():
    weight = prepack(torch.zeros(16, 32, dtype=torch.uint8), torch.ones(16, 2), 4)
    for x in (torch.ones(2, 32), torch.ones(2, 64).int(), torch.tensor(1.0), torch.ones(2, 64, device="meta")):
        with pytest.raises(ValueError, match="64"):
            prepacked_matmul(x, weight)
