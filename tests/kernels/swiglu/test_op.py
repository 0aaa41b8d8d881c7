"""The gate against torch's in fp64, and the exponential of the C code by itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

from leanmill.kernels.swiglu import cpu, naive
from leanmill.kernels.swiglu.op import _swiglu, swiglu
from tests.kernels.launcher import DEVICE, DTYPES, kernel_module


def reference(gate_up, upstream):
    twin = gate_up.detach().double().requires_grad_()
    gate, up = twin.chunk(2, dim=-1)
    out = F.silu(gate) * up
    out.backward(upstream.double())
    return out.detach(), twin.grad


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=2),
    st.integers(0, 40),
    st.sampled_from([*DTYPES, torch.float64]),
    st.booleans(),
)
def test_result_and_gradient_equal_torchs(lead, width, dtype, is_strided):
    gate_up = (torch.randn(*lead, 2 * width) * 4).to(dtype)
    if is_strided:
        gate_up = gate_up.repeat_interleave(2, dim=-1)[..., ::2]
    gate_up.requires_grad_()
    out = swiglu(gate_up)
    upstream = torch.randn(out.shape).to(dtype)
    out.backward(upstream)
    expected, grad = reference(gate_up, upstream)
    tolerance = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-6, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gate_up.grad.double(), grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_equals_the_definition(dtype):
    kernel = kernel_module("swiglu")
    gate_up, grad = torch.randn(3, 70).to(dtype), torch.randn(3, 35).to(dtype)
    on = [t.to(DEVICE) for t in (gate_up, grad)]
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(kernel.swiglu(on[0]).cpu(), naive.swiglu(gate_up), **tolerance)
    torch.testing.assert_close(kernel.backward(*on).cpu(), naive.backward(gate_up, grad), **tolerance)
    assert kernel.swiglu(on[0][:0]).shape == (0, 35)


def test_exponential_over_its_whole_range():
    """silu(-x) / -x is 1 / (1 + e^x), so the C exponential shows where e^x is large; then special values."""
    if cpu.library() is None:
        pytest.skip("no C compiler")
    x = torch.cat([torch.linspace(-87, 87, 100_001), torch.tensor([0.0, -0.0, 1e-30])])
    got = cpu.swiglu(torch.stack([x, torch.ones_like(x)], dim=-1)).squeeze(-1).double()
    expected = F.silu(x.double())
    assert ((got - expected).abs() <= expected.abs() * 8e-7 + 1e-38).all()
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -200.0, 200.0, 3e38])
    got = cpu.swiglu(torch.stack([special, torch.ones_like(special)], dim=-1)).squeeze(-1)
    torch.testing.assert_close(got, F.silu(special), equal_nan=True)


def test_gradcheck_opcheck_and_compile():
    assert torch.autograd.gradcheck(swiglu, torch.randn(3, 6, dtype=torch.float64, requires_grad=True))
    torch.library.opcheck(_swiglu, (torch.randn(3, 6, requires_grad=True),))
    x = torch.randn(2, 3, 6)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    for leaf, call in zip(leaves, (swiglu, compiled), strict=True):
        call(leaf).sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_odd_widths_and_integers_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 5\)"):
        swiglu(torch.randn(2, 5))
    with pytest.raises(ValueError, match="int64"):
        swiglu(torch.ones(2, 4, dtype=torch.int64))
