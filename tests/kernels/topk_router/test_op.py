"""The router against its formulas token by token, every gradient, on every path."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leanmill.kernels.topk_router import cpu, naive
from leanmill.kernels.topk_router.op import _route, topk_router
from tests.kernels.launcher import DEVICE, DTYPES, kernel_module


def by_hand(logits, top_k, *, score, normalise, bias, scaling):
    """The definition for one token, in Python's floats."""
    exponentials = [math.exp(x) for x in logits]
    softmax = [x / sum(exponentials) for x in exponentials]
    scores = [1 / (1 + math.exp(-x)) for x in logits] if score == "sigmoid" else softmax
    order = sorted(range(len(scores)), key=lambda e: (-(scores[e] + bias[e]), e))[:top_k]
    divisor = sum(scores[e] for e in order) if normalise else 1
    shares = [s / sum(scores) for s in scores]
    return order, [scaling * scores[e] / divisor for e in order], math.log(sum(exponentials)) ** 2, shares


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalise", [False, True])
def test_equals_the_formulas(score, normalise):
    num_tokens, num_experts, top_k = 40, 7, 3
    logits, bias = torch.randn(num_tokens, num_experts) * 2, torch.randn(num_experts) * 0.2
    options = {"score": score, "normalise": normalise, "scaling": 2.5}
    routed = topk_router(logits, top_k, bias=bias, **options)
    tokens = [by_hand(row.tolist(), top_k, bias=bias.tolist(), **options) for row in logits]
    assert routed.experts.tolist() == [token[0] for token in tokens]
    torch.testing.assert_close(routed.weights, torch.tensor([token[1] for token in tokens]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(routed.z_loss.item(), sum(token[2] for token in tokens) / num_tokens, rtol=1e-5, atol=0)
    means = torch.tensor([token[3] for token in tokens]).mean(0)
    torch.testing.assert_close(routed.mean_probability, means, rtol=1e-5, atol=1e-7)
    assert routed.counts.tolist() == routed.experts.reshape(-1).bincount(minlength=num_experts).tolist()


def outputs_and_gradient(function, logits, seed=0):
    leaf = logits.detach().requires_grad_()
    weights, index, counts, z_loss, mean = function(leaf)
    generator = torch.Generator().manual_seed(seed)
    factors = [torch.randn(t.shape, generator=generator).to(t) for t in (weights, z_loss, mean)]
    total = (weights * factors[0]).sum() + z_loss * factors[1] + (mean * factors[2]).sum() * 30
    (grad,) = torch.autograd.grad(total, leaf)
    return weights.detach(), index, counts, z_loss.detach(), mean.detach(), grad


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 30),
    st.integers(1, 40),
    st.data(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([*DTYPES, torch.float64]),
)
def test_outputs_and_gradient_equal_the_definition(num_tokens, num_experts, data, is_sigmoid, normalise, dtype):
    top_k = data.draw(st.integers(1, num_experts))
    # On a grid, so that logits are equal or clearly apart, whatever the rounding of exponentials.
    logits = ((torch.randn(num_experts, num_tokens) * 12).round() / 4).to(dtype).t()
    bias = torch.randn(num_experts) if data.draw(st.booleans()) else None
    score = "sigmoid" if is_sigmoid else "softmax"
    got = outputs_and_gradient(
        lambda x: topk_router(x, top_k, score=score, normalise=normalise, bias=bias, scaling=1.5), logits
    )
    options = {"is_sigmoid": is_sigmoid, "normalise": normalise, "scaling": 1.5}
    reference = logits.to(torch.promote_types(dtype, torch.float32))
    expected = outputs_and_gradient(lambda x: naive.topk_router(x, bias, top_k, **options), reference)
    assert torch.equal(got[1], expected[1])
    assert torch.equal(got[2], expected[2])
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 2e-5)
    for one, other in zip((*got[:1], *got[3:5]), (*expected[:1], *expected[3:5]), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(got[5].to(expected[5].dtype), expected[5], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_sigmoid", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_triton_equals_the_definition(dtype, is_sigmoid, normalise):
    kernel = kernel_module("topk_router")
    for num_tokens, num_experts, top_k in ((70, 5, 2), (3, 9, 9)):
        logits = (torch.randn(num_tokens, num_experts) * 3).to(dtype)
        bias = torch.randn(num_experts) if num_experts == 5 else None
        options = {"is_sigmoid": is_sigmoid, "normalise": normalise, "scaling": 1.5}
        on = logits.to(DEVICE), None if bias is None else bias.to(DEVICE)
        got = [t.cpu() for t in kernel.topk_router(*on, top_k, **options)]
        expected = naive.topk_router(logits, bias, top_k, **options)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        grads = torch.randn(num_tokens, top_k), torch.randn(()), torch.randn(num_experts) * 30
        tolerance = 1e-4 if dtype == torch.float32 else 1e-2
        got_grad = kernel.backward(on[0], got[1].to(DEVICE), tuple(g.to(DEVICE) for g in grads), **options).cpu()
        expected_grad = naive.backward(logits, expected[1], grads, **options)
        torch.testing.assert_close(got_grad, expected_grad, rtol=tolerance, atol=tolerance)


def all_paths():
    yield naive
    if cpu.library() is not None:
        yield cpu
    yield kernel_module("topk_router")


@pytest.mark.parametrize("path", list(all_paths()), ids=lambda m: m.__name__.rsplit(".", 1)[-1])
def test_ties_keep_the_lower_expert_and_nan_rows_choose_the_first(path):
    device = DEVICE if path.__name__.endswith("kernel") else "cpu"
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0], [0.0, -0.0, 0.0, -0.0, 0.0], [1.0, float("nan"), 2.0, 3.0, 4.0]])
    logits[1] = 0.0
    options = {"is_sigmoid": False, "normalise": True, "scaling": 1.0}
    index = path.topk_router(logits.to(device), None, 3, **options)[1].cpu()
    assert index.tolist() == [[1, 2, 4], [0, 1, 2], [0, 1, 2]]
    sigmoid = path.topk_router(logits.to(device), None, 3, **(options | {"is_sigmoid": True}))[1].cpu()
    assert sigmoid[:2].tolist() == [[1, 2, 4], [0, 1, 2]]
    assert sigmoid[2].tolist() == [1, 4, 3]


@pytest.mark.parametrize("path", list(all_paths()), ids=lambda m: m.__name__.rsplit(".", 1)[-1])
@pytest.mark.parametrize("is_sigmoid", [False, True])
def test_weights_of_vanishing_scores_still_sum_to_one(path, is_sigmoid):
    device = DEVICE if path.__name__.endswith("kernel") else "cpu"
    logits = torch.tensor([[-60.0, -61.0, -62.0, -63.0]]) - (0.0 if is_sigmoid else 100.0)
    weights = path.topk_router(logits.to(device), None, 2, is_sigmoid=is_sigmoid, normalise=True, scaling=1.0)[0].cpu()
    share = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(weights, torch.tensor([[share, 1 - share]]), rtol=1e-5, atol=0)


def test_gradcheck_and_opcheck():
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    for score in ("softmax", "sigmoid"):
        for normalise in (False, True):

            def outputs(x, score=score, normalise=normalise):
                routed = topk_router(x, 2, score=score, normalise=normalise, scaling=1.5)
                return routed.weights, routed.z_loss, routed.mean_probability

            assert torch.autograd.gradcheck(outputs, logits)
    torch.library.opcheck(_route, (torch.randn(4, 5, requires_grad=True), torch.randn(5), 2, True, True, 1.5))


def test_compiles_whole():
    def loss(x):
        routed = topk_router(x, 2)
        return routed.weights.square().sum() + routed.z_loss + (routed.mean_probability * routed.counts).sum()

    leaves = [torch.arange(20.0).view(4, 5).sin().requires_grad_() for _ in range(2)]
    for leaf, call in zip(leaves, (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")), strict=True):
        call(leaf).backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_sums_do_not_depend_on_the_number_of_threads():
    logits = torch.randn(3000, 8)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = topk_router(logits, 2)
        torch.set_num_threads(3)
        three = topk_router(logits, 2)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_wrong_input_is_refused_with_what_was_given():
    logits = torch.randn(4, 5)
    with pytest.raises(ValueError, match="1 to 5"):
        topk_router(logits, 6)
    with pytest.raises(ValueError, match=r"\(5,\)"):
        topk_router(logits[0], 1)
    with pytest.raises(ValueError, match="int64"):
        topk_router(logits.long(), 1)
    with pytest.raises(ValueError, match="'tanh'"):
        topk_router(logits, 1, score="tanh")
    with pytest.raises(ValueError, match=r"\[5\]"):
        topk_router(logits, 1, bias=torch.randn(4))
