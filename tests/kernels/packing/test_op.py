"""Packing: layouts by hand, exact round trips, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leanmill.kernels.packing import cpu, naive
from leanmill.kernels.packing.encoding import code_range, codes_per_byte, number_of, packed_length
from leanmill.kernels.packing.op import pack, unpack


ENCODINGS = [1, 2, 4, 8, "ternary"]


def random_codes(encoding, *shape):
    lowest, largest = code_range(number_of(encoding))
    return torch.randint(lowest, largest + 1, shape).to(torch.int8 if encoding == "ternary" else torch.uint8)


def byte_by_hand(codes, encoding):
    if encoding == "ternary":
        value = 0
        for code in (codes + [0] * 4)[:5]:
            value = value * 3 + code + 1
        return -(-value * 256 // 243)
    return sum(code << (encoding * i) for i, code in enumerate(codes))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_bytes_are_those_of_the_layout(encoding):
    per_byte = codes_per_byte(number_of(encoding))
    codes = random_codes(encoding, 3, 4 * per_byte + max(per_byte // 2, 0))
    expected = [
        [byte_by_hand(row[i : i + per_byte], encoding) for i in range(0, len(row), per_byte)] for row in codes.tolist()
    ]
    assert pack(codes, encoding).tolist() == expected
    assert naive.pack(codes, number_of(encoding)).tolist() == expected


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(ENCODINGS), st.integers(0, 4), st.integers(0, 70), st.integers(0, 2**31))
def test_round_trip_is_exact(encoding, num_rows, num_codes, seed):
    torch.manual_seed(seed)
    codes = random_codes(encoding, 2, num_rows, num_codes)
    packed = pack(codes, encoding)
    assert packed.shape == (2, num_rows, packed_length(num_codes, number_of(encoding)))
    assert torch.equal(packed, naive.pack(codes, number_of(encoding)))
    unpacked = unpack(packed, encoding, num_codes)
    assert unpacked.dtype == codes.dtype
    assert torch.equal(unpacked, codes)
    assert torch.equal(naive.unpack(packed, number_of(encoding), num_codes), codes)


def test_every_group_of_five_digits_and_every_byte():
    codes = torch.cartesian_prod(*[torch.arange(-1, 2, dtype=torch.int8)] * 5)
    packed = pack(codes, "ternary")
    assert packed.unique().numel() == 243
    assert torch.equal(unpack(packed, "ternary", 5), codes)
    any_byte = torch.arange(256, dtype=torch.uint8).view(256, 1)
    assert unpack(any_byte, "ternary", 5).abs().max() == 1


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_strides_and_wider_integers(encoding):
    codes = random_codes(encoding, 24, 40).t()
    assert not codes.is_contiguous()
    assert torch.equal(unpack(pack(codes, encoding), encoding, 24), codes)
    assert torch.equal(pack(codes.long(), encoding), pack(codes.contiguous(), encoding))
    packed = pack(codes, encoding)
    strided = torch.stack([packed, packed], dim=-1)[..., 0]
    assert torch.equal(unpack(strided, encoding, 24), codes)


def test_many_rows_on_several_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for encoding in ENCODINGS:
            codes = random_codes(encoding, 1001, 203)
            assert torch.equal(unpack(pack(codes, encoding), encoding, 203), codes)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("encoding", "dtype", "bad"),
    [
        (1, torch.uint8, 2),
        (2, torch.uint8, 4),
        (4, torch.uint8, 16),
        (4, torch.int8, -1),
        (8, torch.int8, -1),
        (8, torch.int32, 256),
        ("ternary", torch.int8, 2),
        ("ternary", torch.int8, -2),
        ("ternary", torch.uint8, 255),
    ],
)
@pytest.mark.parametrize("at", [0, 63, 66])
def test_codes_out_of_range_are_refused(encoding, dtype, bad, at):
    codes = torch.zeros(2, 67, dtype=dtype)
    codes[1, at] = bad
    with pytest.raises(ValueError, match=rf"\(2, 67\).*{bad}"):
        pack(codes, encoding)


def test_bad_arguments():
    codes = torch.zeros(2, 8, dtype=torch.uint8)
    for encoding in (3, 16, True, "binary"):
        with pytest.raises(ValueError, match="allowed"):
            pack(codes, encoding)
    with pytest.raises(ValueError, match="float32"):
        pack(codes.float(), 4)
    with pytest.raises(ValueError, match="at least one dim"):
        pack(codes[0, 0], 4)
    with pytest.raises(ValueError, match=r"num_codes=9 \(3 bytes\)"):
        unpack(codes[:, :2], 2, 9)
    with pytest.raises(ValueError, match="int8"):
        unpack(codes.to(torch.int8), 2, 32)


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(cpu, "library", lambda: None)
    for encoding in ENCODINGS:
        codes = random_codes(encoding, 3, 17)
        assert torch.equal(unpack(pack(codes, encoding), encoding, 17), codes)


def test_inside_compiled_code_and_by_the_rules_of_operators():
    compiled = torch.compile(lambda c: unpack(pack(c, "ternary"), "ternary", 17), fullgraph=True, backend="aot_eager")
    codes = random_codes("ternary", 3, 17)
    assert torch.equal(compiled(codes), codes)
    torch.library.opcheck(torch.ops.leanmill.pack, (codes, 3))
    torch.library.opcheck(torch.ops.leanmill.unpack, (pack(codes, "ternary"), 3, 17))
