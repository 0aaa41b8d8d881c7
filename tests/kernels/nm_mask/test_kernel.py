"""Triton kernels against the definitions: compiled on a GPU, interpreted elsewhere."""

import os
import subprocess
import sys

import pytest
import torch

from leanmill.kernels.nm_mask import naive
from tests.kernels.launcher import DEVICE, DTYPES, kernel_module
from tests.kernels.nm_mask.test_naive import SPECIAL


kernel = kernel_module("nm_mask")
# Infinities of both signs meet in a gradient, which NumPy, behind the interpreter, remarks on.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")
# Both kernels, one block and several, powers of two and not.
CASES = [(1, 2, 5), (2, 4, 3), (3, 4, 700), (2, 3, 300), (3, 8, 130), (20, 33, 17)]


def drawn(shape, dtype):
    """Normal values with ties, both zeros, infinities and NaNs among them."""
    special = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape)]
    return torch.where(torch.rand(shape) < 0.4, special, torch.randn(shape)).to(DEVICE, dtype)


def same(got, expected):
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def same_but_for_rounding(got, expected):
    """The interpreter cuts fp32 off to bf16 where a GPU rounds to nearest."""
    if DEVICE.type == "cpu" and got.dtype == torch.bfloat16:
        torch.testing.assert_close(got, expected, rtol=torch.finfo(got.dtype).eps, atol=0, equal_nan=True)
    else:
        same(got, expected)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Outputs start as NaN and 7, so that an entry left unwritten shows."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poison(out):
        return out.fill_(float("nan")) if out.is_floating_point() else out.view(torch.uint8).fill_(7).view(out.dtype)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: poison(new_empty(*args, **kwargs)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_kept", "group_size", "num_groups"), CASES)
def test_groups(num_kept, group_size, num_groups, dtype):
    weight, grad = (drawn((2, num_groups * group_size), dtype) for _ in range(2))
    pattern = (num_kept, group_size, False)
    mask = kernel.nm_mask(weight, *pattern)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, naive.nm_mask_by_sort(weight, num_kept, group_size))
    same(kernel.project(weight, *pattern), naive.project(weight, *pattern))
    decay = torch.tensor([0.3], device=DEVICE)
    got = kernel.decayed_grad(grad, weight, decay, *pattern)
    same_but_for_rounding(got, naive.decayed_grad(grad, weight, decay, *pattern))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 4), (2, 8, 20), (4, 1032)])
def test_tiles(shape, dtype):
    weight, grad = (drawn(shape, dtype) for _ in range(2))
    assert torch.equal(kernel.nm_mask(weight, 2, 4, True), naive.tile_mask(weight))
    same(kernel.project(weight, 2, 4, True), naive.project(weight, 2, 4, True))
    decay = torch.tensor([0.3], device=DEVICE)
    got = kernel.decayed_grad(grad, weight, decay, 2, 4, True)
    same_but_for_rounding(got, naive.decayed_grad(grad, weight, decay, 2, 4, True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_kept", "group_size", "num_groups"), CASES)
def test_compressed_form(num_kept, group_size, num_groups, dtype):
    weight = drawn((3, num_groups * group_size), dtype)
    values, indices = kernel.compress(weight, num_kept, group_size)
    expected = naive.compress(weight, num_kept, group_size)
    same(values, expected[0])
    same(indices, expected[1])
    same(kernel.expand(values, indices, num_kept, group_size), naive.project(weight, num_kept, group_size, False))


def test_other_strides_and_no_elements():
    weight = torch.randn(16, 12, device=DEVICE)
    same(kernel.project(weight.t(), 2, 4, False), naive.project(weight.t(), 2, 4, False))
    same(kernel.project(weight.t(), 2, 4, True), naive.project(weight.t(), 2, 4, True))
    same(kernel.compress(weight.t(), 2, 4)[0], naive.compress(weight.t(), 2, 4)[0])
    for shape in ((0, 8), (8, 0)):
        empty = torch.empty(shape, device=DEVICE)
        assert kernel.project(empty, 2, 4, False).shape == kernel.nm_mask(empty, 2, 4, True).shape == shape
        assert kernel.expand(*kernel.compress(empty, 2, 4), 2, 4).shape == shape


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from leanmill.kernels.nm_mask import kernel

counts = {"num_groups": "i32", "num_kept": "i32"}
row = {"width": "i32"}
inputs = {"weight": "*bf16", "grad": "*bf16", "decay": "*fp32", "out": "*bf16"}
packed = {"weight": "*bf16", "values": "*bf16", "indices": "*u8", "groups_a_row": "i32", "bytes_a_row": "i32"}
cases = [
    (kernel._fours_kernel, inputs | counts, {"WHAT": 2, "NUM_GROUPS": 1024}),
    (kernel._groups_kernel, inputs | counts, {"WHAT": 2, "SIZE": 8, "NUM_GROUPS": 128, "LANES": 8}),
    (kernel._tiles_kernel, inputs | row, {"WHAT": 2, "NUM_TILES": 128}),
    (kernel._compress_kernel, packed | counts, {"SIZE": 4, "NUM_GROUPS": 256, "LANES": 4}),
    (kernel._expand_kernel, packed | counts, {"SIZE": 4, "BITS": 2, "NUM_GROUPS": 256, "LANES": 4}),
]
for function, types, constants in cases:
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in signature
               and (signature[name][0] == "*" or name in ("num_groups", "width"))}
    source = ASTSource(function, signature, {(names.index(k),): v for k, v in constants.items()}, aligned)
    result = compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    print(function.__name__, result.metadata.shared, "ld.global.v" in result.asm["ptx"])
"""


def test_kernels_compile_for_a_gpu():
    """What the interpreter accepts and the compiler refuses shows here; needs no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    # Fours and tiles stay in registers: wide loads, no exchange through shared memory.
    assert lines["_fours_kernel"] == lines["_tiles_kernel"] == "0 True"
    assert len(lines) == 5
