"""Packed matmuls against unpacked ones in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leanmill.kernels.packed_matmul import cpu, naive, op
from leanmill.kernels.packed_matmul.op import packed_matmul
from leanmill.kernels.packing.op import pack


MIDDLE = {1: 0.5, 2: 2, 4: 8, 8: 128, "ternary": 0}


def random_codes(encoding, *shape):
    return torch.randint(-1, 2, shape) if encoding == "ternary" else torch.randint(0, 2**encoding, shape)


def by_hand(x, codes, scales, zeros):
    size = codes.shape[1] // scales.shape[1]
    weight = (codes.double() - zeros.double().repeat_interleave(size, 1)) * scales.double().repeat_interleave(size, 1)
    return x.double() @ weight.t()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 2, 4, 8, "ternary"]),
    st.sampled_from([0, 1, 2, 3, 4, 5, 9, 17, 33, 70]),
    st.integers(1, 31),
    st.sampled_from([1, 7, 40, 64, 130, 320]),
    st.sampled_from([1, 2, 5, 10]),
    st.integers(0, 2**31),
)
def test_any_shape(encoding, num_tokens, num_rows, length, num_groups, seed):
    torch.manual_seed(seed)
    num_groups = num_groups if length % num_groups == 0 else 1
    codes = random_codes(encoding, num_rows, length)
    scales, zeros = torch.rand(num_rows, num_groups) / (2 if encoding != 8 else 100), torch.rand(num_rows, num_groups)
    x = torch.randn(num_tokens, length)
    found = packed_matmul(x, pack(codes, encoding), scales, encoding, zero_points=zeros)
    torch.testing.assert_close(found.double(), by_hand(x, codes, scales, zeros), rtol=1e-4, atol=1e-3)
    found = packed_matmul(x, pack(codes, encoding), scales, encoding)
    middle = torch.full_like(scales, MIDDLE[encoding])
    torch.testing.assert_close(found.double(), by_hand(x, codes, scales, middle), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_strides_and_forms_of_scales(dtype):
    codes = random_codes(4, 6, 64)
    packed, scales = pack(codes, 4), torch.rand(6) / 8
    x = torch.randn(64, 2, 3).permute(2, 1, 0).to(dtype)
    expected = by_hand(x.reshape(6, 64), codes, scales[:, None], torch.full((6, 1), 1.5)).view(3, 2, 6)
    found = packed_matmul(x, packed, scales, 4, zero_points=1.5)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype), rtol=1e-2 if dtype != torch.float64 else 1e-7, atol=1e-2)
    one = packed_matmul(x, packed, torch.tensor(0.25), 4)
    assert torch.equal(one, packed_matmul(x, packed, torch.full((6, 1), 0.25), 4))


@pytest.mark.parametrize("most_unpacked", [1, 600, 1 << 22])
@pytest.mark.parametrize("encoding", [1, 2, 4, 8, "ternary"])
def test_many_tokens_in_bf16_multiply_the_weight_rounded_to_it(encoding, most_unpacked, monkeypatch):
    monkeypatch.setattr(cpu, "_MOST_UNPACKED", most_unpacked)
    monkeypatch.setattr(op, "multiplies_natively", lambda dtype: True)
    codes = random_codes(encoding, 19, 120)
    scales, zeros = torch.rand(19, 3) / 8, torch.rand(19, 3)
    x = torch.randn(23, 120).bfloat16()
    size = 120 // 3
    wide = (codes - zeros.repeat_interleave(size, 1)) * scales.repeat_interleave(size, 1)
    found = packed_matmul(x, pack(codes, encoding), scales, encoding, zero_points=zeros)
    expected = x.double() @ wide.bfloat16().double().t()
    allowed = expected.abs() * 2**-7 + (x.double().abs() @ wide.double().abs().t()) * 1e-5
    assert ((found.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 18])
@pytest.mark.parametrize("length", [1, 5, 79, 2500])
def test_ternary_with_int8_activations_is_exact(num_tokens, length):
    codes = random_codes("ternary", 7, length)
    activations = torch.randint(-128, 128, (num_tokens, length)).to(torch.int8)
    activations[0] = -128
    codes[0] = 1
    found = torch.ops.leanmill.ternary_int8_matmul(activations, pack(codes, "ternary"))
    assert torch.equal(found, (activations.long() @ codes.t()).int())


def test_activations_are_rounded_as_in_bitnet():
    x, codes = torch.randn(9, 100) * 7, random_codes("ternary", 4, 100)
    x[2] = 0
    largest = x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    rounded = (x * (127 / largest)).round().clamp(-128, 127)
    expected = (rounded @ codes.float().t()) * (largest / 127) * 0.3
    found = packed_matmul(x, pack(codes, "ternary"), torch.tensor(0.3), "ternary", int8_activations=True)
    torch.testing.assert_close(found, expected)
    native = torch.ops.leanmill.quantise_tokens(x)
    assert all(map(torch.equal, native, naive.quantise_tokens(x)))


def test_bad_arguments():
    packed, x, scales = pack(random_codes(4, 6, 64), 4), torch.randn(2, 64), torch.rand(6, 2)
    for bad_x, bad_packed, bad_scales in (
        (x[:, :60], packed, scales),
        (x.int(), packed, scales),
        (x, packed.int(), scales),
        (x, packed[0], scales),
        (x, packed, scales[:5]),
        (x, packed, torch.rand(6, 3)),
        (x, packed, scales.int()),
    ):
        with pytest.raises(ValueError, match="packed|scales"):
            packed_matmul(bad_x, bad_packed, bad_scales, 4)
    with pytest.raises(ValueError, match="int8_activations"):
        packed_matmul(x, packed, scales, 4, int8_activations=True)


def test_without_a_compiler_inside_compiled_code_and_by_the_rules_of_operators(monkeypatch):
    packed, x, scales = pack(random_codes(2, 6, 64), 2), torch.randn(2, 64), torch.rand(6, 2)
    expected = packed_matmul(x, packed, scales, 2)
    compiled = torch.compile(lambda x: packed_matmul(x, packed, scales, 2), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    zeros = torch.zeros_like(scales)
    torch.library.opcheck(torch.ops.leanmill.packed_matmul, (x, packed, scales, zeros, 2))
    monkeypatch.setattr(cpu, "library", lambda: None)
    torch.testing.assert_close(packed_matmul(x, packed, scales, 2), expected)
