"""The router against its formulas token by token, every gradient, on every path."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leanmill.kernels.topk_router import cpu, naive
from leanmill.kernels.topk_router.op import Groups, _route, topk_router
from leanmill.kernels.topk_router.settings import Settings
from tests.kernels.compiled import assert_compiles
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


@st.composite
def calls(draw):
    """(logits, bias, token mask, settings) of every kind; logits on a grid, so that they are equal or clearly apart."""
    num_groups, size = draw(st.integers(1, 5)), draw(st.integers(1, 8))
    num_experts = num_groups * size
    top_k = draw(st.integers(1, num_experts))
    open_groups = draw(st.integers(-(-top_k // size), num_groups))
    num_sequences = draw(st.integers(1, 4))
    num_tokens = num_sequences * draw(st.integers(0, 9))
    forms = draw(st.booleans()), draw(st.booleans()), 1.5
    told = Settings(top_k, *forms, num_groups, open_groups, draw(st.integers(1, size)), num_sequences)
    logits = (torch.randn(num_experts, num_tokens) * 4).round().t() / 4
    if draw(st.booleans()):
        closed = torch.rand(num_tokens, num_experts) < 0.4
        closed[:, draw(st.integers(0, num_experts - 1))] = False
        logits = logits.masked_fill(closed, -torch.inf)
    bias = torch.randn(num_experts) if draw(st.booleans()) else None
    mask = torch.rand(num_tokens) < 0.7 if draw(st.booleans()) else None
    return logits, bias, mask, told


@settings(max_examples=60, deadline=None)
@given(calls(), st.sampled_from([*DTYPES, torch.float64]))
def test_outputs_and_gradient_equal_the_definition(call, dtype):
    logits, bias, mask, told = call
    logits = logits.to(dtype)
    got = outputs_and_gradient(
        lambda x: topk_router(
            x,
            told.top_k,
            score="sigmoid" if told.is_sigmoid else "softmax",
            normalise=told.normalise,
            bias=bias,
            scaling=told.scaling,
            groups=Groups(told.num_groups, told.open_groups, told.num_best),
            token_mask=mask,
            num_sequences=told.num_sequences,
        ),
        logits,
    )
    reference = logits.to(torch.promote_types(dtype, torch.float32))
    expected = outputs_and_gradient(lambda x: naive.topk_router(x, bias, mask, told), reference)
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
    plain = Settings(2, is_sigmoid, normalise, 1.5)
    grouped = plain._replace(top_k=3, num_groups=3, open_groups=2, num_best=2, num_sequences=2)
    for shape, told in (((70, 5), plain), ((3, 9), plain._replace(top_k=9)), ((16, 12), grouped)):
        logits = (torch.randn(shape) * 3).to(dtype)
        bias = torch.randn(shape[1]) if shape[1] == 5 else None
        mask = torch.rand(shape[0]) < 0.7 if shape[1] == 12 else None
        if mask is not None:
            logits[:, ::2] = -torch.inf
            logits[~mask] = torch.nan
        on = [None if x is None else x.to(DEVICE) for x in (logits, bias, mask)]
        got = [t.cpu() for t in kernel.topk_router(*on, told)]
        expected = naive.topk_router(logits, bias, mask, told)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        means = (told.num_sequences, shape[1])
        grads = torch.randn(shape[0], told.top_k), torch.randn(()), torch.randn(means) * 30
        tolerance = 1e-4 if dtype == torch.float32 else 1e-2
        upstream = tuple(g.to(DEVICE) for g in grads)
        got_grad = kernel.backward(on[0], got[1].to(DEVICE), on[2], upstream, told).cpu()
        expected_grad = naive.backward(logits, expected[1], mask, grads, told)
        torch.testing.assert_close(got_grad, expected_grad, rtol=tolerance, atol=tolerance)


def test_triton_compiles_for_a_gpu():
    types = {"logits_at": "*bf16", "bias_at": "*fp32", "index_at": "*i64", "weights_at": "*fp32", "counts_at": "*i32"}
    types |= dict.fromkeys(["sums_at", "grad_weights_at", "grad_z_at", "grad_mean_at"], "*fp32") | {"mask_at": "*u8"}
    numbers = ["num_tokens", "length", "num_experts", "top_k", "num_groups", "open_groups", "num_best"]
    types |= {"grad_at": "*bf16", "scaling": "fp32"} | dict.fromkeys(numbers, "i32")
    forms = [
        {"IS_SIGMOID": sigmoid, "NORMALISE": sigmoid, "HAS_MASK": sigmoid, "ROWS": 32, "EXPERTS": 64}
        for sigmoid in (False, True)
    ]
    more = {"TOP_K": 8, "ROUNDS": 2, "SUMS_SCORES": False}
    forward = [
        form | more | {"HAS_BIAS": form["IS_SIGMOID"], "GROUPS": 8 if form["IS_SIGMOID"] else 1} for form in forms
    ]
    for name, variants in {"_route_kernel": forward, "_route_backward_kernel": forms}.items():
        assert_compiles("leanmill.kernels.topk_router.kernel", name, types, variants)


def all_paths():
    yield naive
    if cpu.library() is not None:
        yield cpu
    yield kernel_module("topk_router")


on_every_path = pytest.mark.parametrize("path", list(all_paths()), ids=lambda m: m.__name__.rsplit(".", 1)[-1])


def device_of(path):
    return DEVICE if path.__name__.endswith("kernel") else torch.device("cpu")


def choice(path, logits, top_k, *, is_sigmoid=False, bias=None):
    device = device_of(path)
    bias = None if bias is None else bias.to(device)
    return path.topk_router(logits.to(device), bias, None, Settings(top_k, is_sigmoid, True, 1.0))[1].tolist()


@on_every_path
@pytest.mark.parametrize("is_sigmoid", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_ties_keep_the_lower_expert(path, is_sigmoid, with_bias):
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0], [0.0, -0.0, 0.0, -0.0, 0.0]])
    bias = torch.zeros(5) if with_bias else None
    assert choice(path, logits, 3, is_sigmoid=is_sigmoid, bias=bias) == [[1, 2, 4], [0, 1, 2]]


@on_every_path
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_sigmoid", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_nan_counts_as_largest(path, dtype, is_sigmoid, with_bias):
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor(
        [[0, 0.5, nan, 1], [1, 3, 2, 0], [nan, 1, nan, 0], [nan, inf, -nan, 5], [nan] * 4], dtype=dtype
    )
    # A bias that would choose others where the scores are numbers.
    bias = torch.tensor([2.0, 0, 0, 1]) if with_bias else None
    expected = [[2, 3, 1], [0, 3, 1] if with_bias else [1, 2, 0], [0, 2, 1], [0, 2, 1], [0, 1, 2]]
    assert choice(path, logits, 3, is_sigmoid=is_sigmoid, bias=bias) == expected


@on_every_path
@pytest.mark.parametrize("is_sigmoid", [False, True])
def test_without_a_bias_scores_that_round_to_one_number_are_told_apart(path, is_sigmoid):
    logits = torch.tensor([[30.0, 50, 40, 0], [-300.0, -200, -900, -150], [0.0, -200, -torch.inf, -150]])
    assert choice(path, logits, 3, is_sigmoid=is_sigmoid) == [[1, 2, 0], [3, 1, 0], [0, 3, 1]]


@on_every_path
@pytest.mark.parametrize("num_best", [1, 2])
def test_closed_groups_are_not_chosen_where_biased_scores_are_negative(path, num_best):
    logits, bias = torch.randn(9, 6), torch.full((6,), -5.0)
    told = Settings(3, True, True, 1.0, num_groups=2, open_groups=1, num_best=num_best)
    index = path.topk_router(*(x.to(device_of(path)) for x in (logits, bias)), None, told)[1].cpu()
    value = logits.sigmoid().view(9, 2, 3).sort(descending=True).values[..., :num_best].sum(-1)
    assert torch.equal(index // 3, value.argmax(-1, keepdim=True).expand(-1, 3))


def test_a_nan_token_leaves_the_others_alone():
    logits = torch.randn(5, 6)
    bad = logits.clone()
    bad[2, 3] = torch.nan
    found = []
    for tokens in (logits, bad):
        leaf = tokens.requires_grad_()
        weights = topk_router(leaf, 2, score="sigmoid").weights
        found.append((weights.detach(), *torch.autograd.grad(weights[:, 0].sum(), leaf)))
    others = torch.tensor([0, 1, 3, 4])
    for clean, beside in zip(*found, strict=True):
        assert torch.equal(clean[others], beside[others])
        assert beside[2].isnan().any()


@on_every_path
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_whose_sigmoids_all_vanish(path, normalise, dtype):
    # The sigmoids of the first rows are below fp32's smallest number, those of others small, and of the last one some.
    starts = torch.tensor([-3000.0, -200.0, -104.0, -89.0, -60.0, -21.0, -19.0, -3.0, 0.0])
    logits = (starts[:, None] + torch.linspace(-2, 2, 6) * torch.tensor([1.0, -1, 1, 1, -1, 1])).to(dtype)
    logits[-1, :3] = -torch.inf
    exact = logits.double().requires_grad_()
    index = exact.detach().sort(dim=-1, descending=True, stable=True).indices[:, :2]
    logarithms = torch.nn.functional.logsigmoid(exact)
    weights = logarithms.gather(-1, index).softmax(-1) if normalise else exact.sigmoid().gather(-1, index)
    mean = logarithms.softmax(-1).mean(0)
    told = Settings(2, True, normalise, 1.5)
    on_device = logits.to(device_of(path))
    got = path.topk_router(on_device, None, None, told)
    assert torch.equal(got[1].cpu(), index)
    torch.testing.assert_close(got[0].double().cpu(), 1.5 * weights.detach(), rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(got[4][0].double().cpu(), mean.detach(), rtol=1e-5, atol=0)
    upstream = torch.randn(9, 2), torch.zeros(()), torch.randn(1, 6) * 30
    total = (1.5 * weights * upstream[0]).sum() + (mean * upstream[2]).sum()
    (expected,) = torch.autograd.grad(total, exact)
    found = path.backward(on_device, got[1], None, tuple(g.to(on_device.device) for g in upstream), told)
    close = {torch.float32: 2e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(found.double().cpu(), expected, rtol=close, atol=1e-6)


@on_every_path
@pytest.mark.parametrize("is_sigmoid", [False, True])
def test_weights_of_vanishing_scores_still_sum_to_one(path, is_sigmoid):
    device = device_of(path)
    logits = torch.tensor([[-60.0, -61.0, -62.0, -63.0]]) - (0.0 if is_sigmoid else 100.0)
    weights = path.topk_router(logits.to(device), None, None, Settings(2, is_sigmoid, True, 1.0))[0].cpu()
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
    numbers = Settings(2, True, True, 1.5, num_sequences=2).numbers()
    mask = torch.tensor([True, False, True, True])
    torch.library.opcheck(_route, (torch.randn(4, 5, requires_grad=True), torch.randn(5), mask, 1.5, numbers))


@pytest.mark.parametrize("normalise", [False, True])
def test_gradients_of_sigmoids_that_vanish_in_fp64(normalise):
    logits = torch.randn(3, 5, dtype=torch.float64)
    logits[1] -= 1000

    def outputs(x):
        routed = topk_router(x, 2, score="sigmoid", normalise=normalise)
        return routed.weights, routed.mean_probability

    assert torch.autograd.gradcheck(outputs, logits.requires_grad_())


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
    for groups, message in (
        (Groups(4, 2), r"4 groups do not divide 6 experts; allowed: \[1, 2, 3, 6\]"),
        (Groups(2, 3), "3 open groups of 3 experts for top_k 2; allowed: 1 to 2"),
        (Groups(3, 0), "0 open groups"),
        (Groups(6, 1), "top_k 2; allowed: 2 to 6"),
        (Groups(3, 2, 3), "best 3; allowed: 1 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            topk_router(torch.randn(4, 6), 2, groups=groups)
    with pytest.raises(ValueError, match="bool"):
        topk_router(logits, 2, token_mask=torch.ones(4))
    with pytest.raises(ValueError, match="3 sequences do not divide 4 tokens"):
        topk_router(logits, 2, num_sequences=3)
