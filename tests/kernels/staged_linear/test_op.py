"""The staged linear against autograd on the plain composition."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from leanmill.kernels.staged_linear import naive
from leanmill.kernels.staged_linear.op import staged_linear


def stage(weight, scale):
    return torch.tanh(weight / scale) * scale


def arguments(dtype=torch.float64, frozen=()):
    torch.manual_seed(3)
    shapes = {"x": (2, 3, 5), "weight": (4, 5), "bias": (4,), "scale": (4, 1)}
    made = {name: torch.rand(shape, dtype=dtype) + 0.5 for name, shape in shapes.items()}
    return [tensor.requires_grad_(name not in frozen) for name, tensor in made.items()]


def gradients(function, given):
    x, weight, bias, scale = given
    for tensor in given:
        tensor.grad = None
    function(x, weight, bias, stage, scale).square().sum().backward()
    return [tensor.grad for tensor in given]


def test_gradcheck():
    given = arguments()
    assert torch.autograd.gradcheck(lambda x, w, b, s: staged_linear(x, w, b, stage, s), given)
    assert torch.autograd.gradcheck(lambda x, w, s: staged_linear(x, w, None, stage, s), [given[0], given[1], given[3]])


@pytest.mark.parametrize("frozen", [(), ("x",), ("weight",), ("weight", "scale"), ("x", "weight", "scale"), ("bias",)])
def test_only_what_needs_a_gradient_gets_one(frozen):
    given = arguments(frozen=frozen)
    torch.testing.assert_close(gradients(staged_linear, given), gradients(naive.staged_linear, given))


def test_nothing_weight_sized_is_kept_and_the_stage_runs_twice():
    x, weight, bias, scale = arguments()
    calls, kept = [], []

    def counted(weight, scale):
        calls.append(torch.is_grad_enabled())
        return stage(weight, scale)

    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = staged_linear(x, weight, bias, counted, scale)
    own = {tensor.data_ptr() for tensor in (x, weight, bias, scale)}
    assert {tensor.data_ptr() for tensor in kept} <= own
    out.sum().backward()
    assert calls == [False, True]


def test_two_uses_in_one_graph_add_up():
    given = arguments()

    def twice(function):
        def run(x, weight, bias, stage, scale):
            hidden = function(x, weight, bias, stage, scale)
            return function(F.pad(hidden, (0, 1)), weight, bias, stage, scale)

        return run

    torch.testing.assert_close(gradients(twice(staged_linear), given), gradients(twice(naive.staged_linear), given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_and_autocast(dtype):
    given = arguments(dtype)
    torch.testing.assert_close(gradients(staged_linear, given), gradients(naive.staged_linear, given))
    given = arguments(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = staged_linear(*given[:3], stage, given[3])
        theirs = naive.staged_linear(*given[:3], stage, given[3])
    assert ours.dtype == theirs.dtype == torch.bfloat16
    # Backward outside of the context, as training loops call it.
    found = torch.autograd.grad(ours.float().square().sum(), given)
    torch.testing.assert_close(found, torch.autograd.grad(theirs.float().square().sum(), given), rtol=2e-2, atol=2e-2)


def test_inside_compiled_code():
    given = arguments()
    compiled = torch.compile(
        lambda x, w, b, stage, s: staged_linear(x, w, b, stage, s), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(gradients(compiled, given), gradients(naive.staged_linear, given))


def test_a_parameter_that_was_not_passed_is_refused():
    x, weight, bias, scale = arguments()
    out = staged_linear(x, weight, bias, lambda weight: stage(weight, scale))
    with pytest.raises(ValueError, match=r"\(4, 1\).*was not passed"):
        out.sum().backward()


def test_shapes_are_checked():
    x, weight, bias, scale = arguments()
    with pytest.raises(ValueError, match=r"\(5, 4\).*does not fit x"):
        staged_linear(x, weight, bias, lambda w, s: stage(w, s).t(), scale)
    with pytest.raises(ValueError, match=r"bias \(3,\)"):
        staged_linear(x, weight, bias[:3], stage, scale)


def test_empty_rows():
    given = arguments()
    given[0] = torch.zeros(0, 5, dtype=torch.float64, requires_grad=True)
    assert all(grad is not None and not grad.any() for grad in gradients(staged_linear, given))
