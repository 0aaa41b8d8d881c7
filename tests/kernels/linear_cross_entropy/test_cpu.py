"""The C pass over logits against the definition in fp64, at its edges, and bit by bit again."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leanmill.kernels.linear_cross_entropy import cpu, naive
from leanmill.kernels.linear_cross_entropy.naive import Form
from leanmill.kernels.native import compiler, dtypes
from tests.kernels.linear_cross_entropy.rows import assert_equals_definition


pytestmark = pytest.mark.skipif(cpu.library() is None, reason="needs a C compiler")


@settings(max_examples=25, deadline=None)
@given(
    num_rows=st.integers(1, 5),
    width=st.sampled_from([1, 2, 15, 16, 17, 100, 1023, 1024, 1025, 3000]),
    dtype=st.sampled_from(list(dtypes.SUFFIXES)),
    form=st.sampled_from([Form(), Form(scale=-0.5), Form(softcap=3.0, scale=2.0), Form(1.5, 0.0, 0.01, 0.1)]),
    with_scales=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_the_definition(num_rows, width, dtype, form, with_scales, seed):
    generator = torch.Generator().manual_seed(seed)
    raw = (torch.randn(num_rows, width, generator=generator) * 4).to(dtype)
    labels = torch.randint(-1, width, (num_rows,), generator=generator)
    scales = torch.randn(num_rows, generator=generator) if with_scales else None
    assert_equals_definition(cpu.cross_entropy_, raw, labels, scales, form)


def test_exp_is_within_two_ulp_and_keeps_nan():
    library = compiler.load_library(cpu._SOURCE)
    x = torch.cat([-torch.rand(100_000) * 87.3, -torch.rand(100_000), torch.tensor([0.0, -87.4, -1e30, -torch.inf])])
    got = torch.full_like(x, torch.nan)
    library.exp_row(dtypes.pointer(x), dtypes.pointer(got), ctypes.c_int64(len(x)))
    exact = x.double().exp()
    assert ((got.double() - exact).abs() <= 2 * 2**-23 * exact)[:-3].all()
    assert (got[-3:] == 0).all()
    assert got[-4] == 1
    nan = torch.full((16,), torch.nan)
    library.exp_row(dtypes.pointer(nan), dtypes.pointer(got), ctypes.c_int64(16))
    assert got[:16].isnan().all()


def test_large_logits_and_minus_infinity_are_exact():
    raw = torch.randn(3, 2000) * 1e4
    raw[:, 1500:] = -torch.inf
    raw[1, :1100] = -torch.inf
    labels = torch.tensor([3, 1200, 7])
    exact = raw.double()
    expected = naive.cross_entropy_(exact, labels, None, Form(), wants_gradient=True)
    got = cpu.cross_entropy_(raw, labels, None, Form(), wants_gradient=True)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(raw.double(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 1500, 1999])
def test_nan_and_infinity_show_in_their_row_only(value, place):
    raw = torch.randn(2, 2000)
    raw[1, place] = value
    losses = cpu.cross_entropy_(raw, torch.tensor([1, 1]), None, Form(), wants_gradient=True)
    assert losses.isfinite().tolist() == [True, False]
    assert raw[0].isfinite().all()
    assert raw[1].isnan().any()


def test_a_row_without_a_label_is_zeroed_whatever_it_holds():
    raw = torch.full((2, 1030), torch.nan)
    losses = cpu.cross_entropy_(raw, torch.tensor([-1, -1]), None, Form(), wants_gradient=True)
    assert (losses == 0).all()
    assert (raw == 0).all()


def test_bitwise_the_same_on_any_number_of_threads():
    raw, labels = torch.randn(64, 5000), torch.randint(5000, (64,))
    found, before = [], torch.get_num_threads()
    try:
        for num_threads in (1, 2, 1):
            torch.set_num_threads(num_threads)
            written = raw.clone()
            found.append((cpu.cross_entropy_(written, labels, None, Form(), wants_gradient=True), written))
    finally:
        torch.set_num_threads(before)
    for losses, written in found[1:]:
        assert torch.equal(losses, found[0][0])
        assert torch.equal(written, found[0][1])
