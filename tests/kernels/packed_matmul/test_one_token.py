"""One token in whole numbers, on every kind of processor this one can be, against fp64."""

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from leanmill.kernels.native import compiler, threads
from leanmill.kernels.packed_matmul import cpu, one_token
from leanmill.kernels.packed_matmul.held import HeldRows
from leanmill.kernels.packed_matmul.op import packed_matmul
from leanmill.kernels.packing.encoding import number_of
from leanmill.kernels.packing.op import pack
from tests.kernels.packed_matmul.test_op import MIDDLE, by_hand, random_codes


PROCESSORS = {"this": "native", "AVX2": "x86-64-v3", "none": "x86-64"}
SHAPES = [(1, 1, 1), (7, 40, 1), (9, 333, 1), (13, 640, 2), (6, 960, 3), (31, 1920, 12), (5, 2500, 1)]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """What a compiler makes of the C code for each kind of processor, where there is one."""
    program, found = shutil.which("cc"), {"this": one_token.library()}
    for name, march in PROCESSORS.items():
        path = tmp_path_factory.mktemp("kernels") / "one_token.so"
        if march == "native" or program is None or platform.machine() != "x86_64":
            continue
        command = compiler.build_command(program, Path(one_token.__file__).with_suffix(".c"), str(path))
        command = [f"-march={march}" if part == "-march=native" else part for part in command]
        subprocess.run(command, capture_output=True, check=True)
        found[name] = ctypes.CDLL(str(path))
    return found


@pytest.fixture(params=PROCESSORS)
def processor(request, libraries, monkeypatch):
    library = libraries.get(request.param)
    if library is None:
        pytest.skip(f"no compiler for {request.param}")
    monkeypatch.setattr(one_token, "library", lambda: library)
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("encoding", MIDDLE)
def test_products(encoding, shape, processor):
    num_rows, length, num_groups = shape
    codes = random_codes(encoding, num_rows, length)
    scales, zeros = torch.rand(num_rows, num_groups) / 8, torch.rand(num_rows, num_groups) * 3
    x = torch.randn(1, length)
    x[0, length // 2] *= 300
    number = number_of(encoding)
    if not one_token.covers(number, length, num_groups):
        assert processor == "none" or encoding == 8
        return
    assert processor != "none"
    found = one_token.packed_matmul(x, pack(codes, encoding), scales, zeros, number)
    expected = by_hand(x, codes, scales, zeros)
    # Half a unit of each number of the token, and fp32 sums.
    size = length // num_groups
    largest = (codes.double() - zeros.repeat_interleave(size, 1)).abs() * scales.repeat_interleave(size, 1)
    unit = x.abs().max().item() * 2**-21
    allowed = unit / 2 * largest.sum(-1) + 1e-6 * (largest @ x.abs().double().t())[:, 0] + 1e-6
    assert ((found - expected)[0].abs() <= allowed).all()


@pytest.mark.parametrize("length", [1, 5, 79, 2500, 9001])
def test_whole_tokens_times_ternary_codes_are_exact(length, processor):
    codes, tokens = random_codes("ternary", 7, length), torch.randint(-128, 128, (1, length)).to(torch.int8)
    tokens[0, ::2] = -128
    codes[0], codes[1] = 1, -1
    if not one_token.covers(3, length, 1):
        assert processor == "none"
        return
    found = one_token.ternary_int8_matmul(tokens, pack(codes, "ternary"))
    assert torch.equal(found, (tokens.long() @ codes.t()).int())


def test_the_same_on_any_number_of_threads(monkeypatch):
    codes, x = random_codes(4, 257, 640), torch.randn(1, 640)
    scales = torch.rand(257, 5)
    results = []
    for count in (1, 2, 3):
        monkeypatch.setattr(threads, "num_threads_for", lambda rows, elements, count=count: count)
        results.append(packed_matmul(x, pack(codes, 4), scales, 4))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-40, 3e38, 0.0])
def test_tokens_that_are_no_whole_numbers_of_anything(value):
    codes, x = random_codes("ternary", 5, 60), torch.zeros(1, 60)
    x[0, 3] = value
    codes[:, 3] = torch.tensor([1, 0, -1, 1, 1])
    found = packed_matmul(x, pack(codes, "ternary"), torch.ones(5), "ternary")
    expected = x @ codes.float().t()
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("encoding", MIDDLE)
def test_held_rows_compute_what_the_operator_does(encoding, dtype):
    codes, scales = random_codes(encoding, 12, 80), torch.rand(12, 2) / 8
    packed = pack(codes, encoding)
    held = HeldRows(packed, scales, encoding, 80)
    for shape in ((80,), (1, 1, 80), (2, 3, 80), (0, 80)):
        x = torch.randn(shape).to(dtype)
        torch.testing.assert_close(held.multiply(x), packed_matmul(x, packed, scales, encoding))
    compiled = torch.compile(held.multiply, backend="aot_eager")
    x = torch.randn(1, 80).to(dtype)
    torch.testing.assert_close(compiled(x), packed_matmul(x, packed, scales, encoding))
    with pytest.raises(ValueError, match="do(es)? not fit"):
        held.multiply(torch.randn(1, 79))
    with pytest.raises(ValueError, match="has 80 codes a row"):
        HeldRows(packed[:, :-1], scales, encoding, 80)


def test_held_rows_round_tokens_as_in_bitnet_and_do_without_a_compiler(monkeypatch):
    codes, scales, x = random_codes("ternary", 12, 80), torch.rand(12, 1), torch.randn(1, 80)
    packed = pack(codes, "ternary")
    expected = packed_matmul(x, packed, scales, "ternary", int8_activations=True)
    held = HeldRows(packed, scales, "ternary", 80, int8_activations=True)
    torch.testing.assert_close(held.multiply(x), expected)
    monkeypatch.setattr(cpu, "library", lambda: None)
    monkeypatch.setattr(one_token, "library", lambda: None)
    held = HeldRows(packed, scales, "ternary", 80, int8_activations=True)
    torch.testing.assert_close(held.multiply(x), expected)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_held_rows_that_share_one_scale(shape):
    codes, scale, x = random_codes("ternary", 12, 80), torch.full(shape, 0.25), torch.randn(1, 80)
    packed = pack(codes, "ternary")
    expected = packed_matmul(x, packed, scale, "ternary", int8_activations=True)
    held = HeldRows(packed, scale, "ternary", 80, int8_activations=True)
    torch.testing.assert_close(held.multiply(x), expected)
    assert held.scales is scale


@pytest.mark.parametrize(
    ("encoding", "num_groups", "more", "message"),
    [
        ("ternary", 2, {"int8_activations": True}, r"int8_activations with encoding 'ternary' and scales \(12, 2\)"),
        (4, 1, {"int8_activations": True}, "int8_activations with encoding 4"),
        ("ternary", 1, {"int8_activations": True, "zero": 0.5}, "zero is 0.5"),
        ("ternary", 1, {"zero": 0.5}, "zero is 0.5"),
    ],
)
def test_held_rows_refuse_what_they_would_compute_wrongly(encoding, num_groups, more, message):
    packed = pack(random_codes(encoding, 12, 80), encoding)
    with pytest.raises(ValueError, match=message):
        HeldRows(packed, torch.rand(12, num_groups), encoding, 80, **more)
