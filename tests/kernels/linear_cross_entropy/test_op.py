"""The entry: values and gradients against the definition, paths, tracing, memory and errors."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from leanmill.kernels.linear_cross_entropy import naive
from leanmill.kernels.linear_cross_entropy.naive import Form
from leanmill.kernels.linear_cross_entropy.op import linear_cross_entropy
from leanmill.kernels.linear_cross_entropy.operators import summed, token_losses
from tests.kernels.launcher import DEVICE


def operands(num_tokens=23, vocab_size=50, size=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype).requires_grad_()

    hidden, weight, bias = draw(num_tokens, size), draw(vocab_size, size), draw(vocab_size)
    labels = torch.randint(vocab_size, (num_tokens,), generator=generator)
    labels[torch.rand(num_tokens, generator=generator) < 0.2] = -100
    return hidden, weight, bias, labels.to(DEVICE)


def reduced(losses, labels, reduction):
    if reduction == "none":
        # A gradient of its own for every token.
        return (losses * torch.linspace(-1, 2, len(losses), dtype=losses.dtype, device=losses.device)).sum()
    return losses.sum() / ((labels != -100).sum() if reduction == "mean" else 1)


def gradients(loss, *tensors):
    return torch.autograd.grad(loss * 1.7, tensors)


@settings(max_examples=25, deadline=None)
@given(
    num_tokens=st.integers(1, 40),
    vocab_size=st.integers(1, 90),
    size=st.integers(1, 9),
    reduction=st.sampled_from(["sum", "mean", "none"]),
    chunk_tokens=st.sampled_from([None, 1, 7, 64]),
    form=st.sampled_from([Form(), Form(softcap=4.0), Form(0.5, 0.0, 1e-2, 0.1)]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    with_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients(num_tokens, vocab_size, size, reduction, chunk_tokens, form, dtype, with_bias, seed):
    hidden, weight, bias, labels = operands(num_tokens, vocab_size, size, dtype, seed)
    bias = bias if with_bias else None
    wanted = [t for t in (hidden, weight, bias) if t is not None]
    got = linear_cross_entropy(
        hidden,
        weight,
        labels,
        bias,
        reduction=reduction,
        logit_scale=form.scale,
        softcap=form.softcap or None,
        z_loss=form.z_loss,
        label_smoothing=form.label_smoothing,
        chunk_tokens=chunk_tokens,
    )
    if reduction == "none":
        got = reduced(got, labels, reduction)
    twins = [t.detach().double().requires_grad_() for t in wanted]
    losses = naive.token_losses(twins[0], twins[1], twins[2] if with_bias else None, labels, form, -100)
    expected = reduced(losses, labels, reduction)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    if reduction == "mean" and (labels == -100).all():
        return
    for ours, theirs in zip(gradients(got, *wanted), gradients(expected, *twins), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_tokens", [None, 5])
def test_low_precision_rounds_logits_and_nothing_else(dtype, chunk_tokens):
    hidden, weight, _, labels = operands(64, 300, 32, dtype)
    got = linear_cross_entropy(hidden, weight, labels, reduction="sum", chunk_tokens=chunk_tokens)
    twins = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    logits = F.linear(*twins)
    rounded = logits + (logits.detach().to(dtype).float() - logits.detach())
    expected = F.cross_entropy(rounded, labels, reduction="sum")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    for ours, theirs in zip(gradients(got, hidden, weight), gradients(expected, *twins), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.float(), theirs, rtol=3e-2, atol=3e-2 * float(theirs.abs().max()))


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_only_the_gradients_asked_for_are_built(wanted, reduction):
    hidden, weight, _, labels = operands()
    hidden.requires_grad_(wanted[0])
    weight.requires_grad_(wanted[1])
    loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction).sum()
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward()
    assert [t.grad is not None for t in (hidden, weight)] == list(wanted)


def test_a_second_backward_finds_the_same_gradient():
    hidden, weight, _, labels = operands()
    loss = linear_cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(loss * 3, [hidden, weight])
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(3 * a, b)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("form", [Form(z_loss=0.1), Form(scale=0.1), Form(0.3, 0.7, 0.1, 0.1)])
def test_gradient_in_fp64_is_exact_in_fp64(reduction, form):
    *operand, labels = operands(5, 7, 3, torch.float64)
    settings = {"logit_scale": form.scale, "z_loss": form.z_loss, "label_smoothing": form.label_smoothing}
    settings |= {"softcap": form.softcap or None, "reduction": reduction, "chunk_tokens": 2}

    def loss(hidden, weight, bias):
        found = linear_cross_entropy(hidden, weight, labels, bias, **settings)
        return reduced(found, labels, "none") if reduction == "none" else found

    assert torch.autograd.gradcheck(loss, operand)
    expected = reduced(naive.token_losses(*operand, labels, form, -100), labels, reduction)
    for ours, theirs in zip(gradients(loss(*operand), *operand), gradients(expected, *operand), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("num_tokens", [0, 5])
def test_nothing_labelled_is_as_in_torch(num_tokens, reduction, dtype):
    hidden, weight, bias, labels = operands(num_tokens, dtype=dtype)
    labels.fill_(-100)
    ours = linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction)
    theirs = F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction=reduction)
    torch.testing.assert_close(ours, theirs.to(ours.dtype), equal_nan=True)
    for found, expected in zip(
        *(torch.autograd.grad(loss.sum(), (hidden, weight, bias)) for loss in (ours, theirs)), strict=True
    ):
        assert (found == 0).all()
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_empty_and_leading_dimensions(reduction):
    hidden, weight, *_ = operands()
    none = linear_cross_entropy(
        hidden[:0], weight, torch.empty(0, dtype=torch.long, device=DEVICE), reduction=reduction
    )
    assert none.shape == ((0,) if reduction == "none" else ())
    none.nansum().backward()
    assert (weight.grad == 0).all() or reduction == "mean"
    labels = torch.randint(50, (3, 5), device=DEVICE)
    wide = torch.randn(5, 3, 16, device=DEVICE).transpose(0, 1)[..., ::2]
    got = linear_cross_entropy(wide, weight, labels, reduction=reduction)
    expected = F.cross_entropy(F.linear(wide, weight).transpose(1, 2), labels, reduction=reduction)
    torch.testing.assert_close(got, expected)


def test_non_contiguous_weight():
    hidden, weight, _, labels = operands()
    columns = weight.detach().t().contiguous().t().requires_grad_()
    a, b = (linear_cross_entropy(hidden, w, labels) for w in (weight, columns))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(gradients(a, weight)[0], gradients(b, columns)[0])


def test_bitwise_repeatable():
    hidden, weight, _, labels = operands(200, 700, 16)
    found = []
    for _ in range(3):
        loss = linear_cross_entropy(hidden, weight, labels, chunk_tokens=64)
        found.append((loss, *gradients(loss, hidden, weight)))
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, found[0], strict=True))


def test_autocast_around_it_changes_nothing():
    hidden, weight, _, labels = operands()
    plain = linear_cross_entropy(hidden, weight, labels)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        inside = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(plain, inside)
    assert all(
        torch.equal(a, b)
        for a, b in zip(gradients(plain, hidden, weight), gradients(inside, hidden, weight), strict=True)
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction):
    hidden, weight, bias, labels = operands()
    arguments = (hidden, weight, bias, labels, 1.0, 0.0, 0.0, 0.0, -100, 7)
    if reduction == "none":
        torch.library.opcheck(token_losses, arguments)
    else:
        # The gradients it also returns are for its own backward only.
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(summed, (*arguments, True, True, True), test_utils=tests)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_whole(backend, reduction):
    hidden, weight, _, labels = operands()

    def loss(hidden, weight):
        return linear_cross_entropy(hidden * 2, weight, labels, reduction=reduction).sum()

    expected, got = loss(hidden, weight), torch.compile(loss, fullgraph=True, backend=backend)(hidden, weight)
    torch.testing.assert_close(got, expected)
    for a, b in zip(gradients(got, hidden, weight), gradients(expected, hidden, weight), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts CPU storage")
def test_all_logits_never_exist():
    num_tokens, vocab_size = 2048, 4096
    hidden, weight, _, labels = operands(num_tokens, vocab_size, 8)
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=64).backward()
    gc.collect()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert peak < 4 * num_tokens * vocab_size / 8


def test_labels_beyond_the_vocabulary():
    hidden, weight, _, labels = operands()
    labels[3] = 50
    if DEVICE.type == "cpu":
        with pytest.raises(ValueError, match=r"label 50 .*\[0, 50\)"):
            linear_cross_entropy(hidden, weight, labels)
    else:
        assert linear_cross_entropy(hidden, weight, labels).isnan()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4, 3)}, r"hidden \(4, 3\).*weight \(7, 2\)"),
        ({"labels": torch.zeros(5, dtype=torch.long)}, r"labels \(5,\).*\(4,\)"),
        ({"labels": torch.zeros(4)}, r"int64"),
        ({"weight": torch.zeros(7, 2, dtype=torch.float64)}, r"one dtype"),
        ({"hidden": torch.zeros(4, 2, dtype=torch.int32)}, r"one dtype"),
        ({"weight": torch.zeros(7, 2, device="meta")}, r"devices"),
        ({"bias": torch.zeros(6)}, r"bias \(6,\)"),
        ({"reduction": "max"}, r"'max'"),
        ({"softcap": -1.0}, r"softcap=-1.0"),
        ({"z_loss": -0.1}, r"z_loss=-0.1"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1.0"),
        ({"chunk_tokens": 0}, r"chunk_tokens=0"),
    ],
)
def test_errors_say_what_was_given(change, message):
    given = {"hidden": torch.zeros(4, 2), "weight": torch.zeros(7, 2), "labels": torch.zeros(4, dtype=torch.long)}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(given | change))
