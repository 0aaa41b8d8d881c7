"""The entries: every form of teacher against the definition, tracing, memory and errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from leanmill.kernels.linear_kl import naive
from leanmill.kernels.linear_kl.naive import KINDS, Form
from leanmill.kernels.linear_kl.op import (
    TeacherHead,
    TeacherLogits,
    TopK,
    linear_kl,
    linear_kl_and_cross_entropy,
)
from leanmill.kernels.linear_kl.operators import summed
from tests.kernels.launcher import DEVICE
from tests.kernels.linear_kl.rows import PEAKS, peaked, top_k_oracle


def operands(num_tokens=23, vocab_size=50, size=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype).requires_grad_()

    labels = torch.randint(vocab_size, (num_tokens,), generator=generator)
    labels[torch.rand(num_tokens, generator=generator) < 0.2] = -100
    student = (draw(num_tokens, size), draw(vocab_size, size), draw(vocab_size))
    teacher = (draw(num_tokens, size + 3), draw(vocab_size, size + 3), draw(vocab_size))
    return student, teacher, labels.to(DEVICE)


def teachers(teacher, labels):
    hidden, weight, bias = (t.detach() for t in teacher)
    logits = F.linear(hidden, weight, bias)
    log_probs, indices = logits.log_softmax(-1).topk(4)
    # Another tail than the cache would give, so that one that is passed on is seen to be used.
    tail = naive.log_mass_left(log_probs, 50).squeeze(-1) - 0.5
    return {
        "head": (TeacherHead(*teacher), lambda s, form: naive.divergence(s, logits, form)),
        "logits": (TeacherLogits(lambda part: logits[part]), lambda s, form: naive.divergence(s, logits, form)),
        "head_top_k": (
            TeacherHead(*teacher, top_k=4),
            lambda s, form: naive.top_k_divergence(
                s, indices, log_probs, form, naive.top_k_of(logits, 4, form.temperature)[2]
            ),
        ),
        "top_k": (TopK(indices, log_probs), lambda s, form: naive.top_k_divergence(s, indices, log_probs, form)),
        "tail": (
            TopK(indices, log_probs, tail),
            lambda s, form: naive.top_k_divergence(s, indices, log_probs, form, tail),
        ),
    }


@settings(max_examples=25, deadline=None)
@given(
    source=st.sampled_from(["head", "logits", "head_top_k", "top_k", "tail"]),
    kind=st.sampled_from([kind for kind in KINDS if kind != "mse"]),
    reduction=st.sampled_from(["sum", "mean"]),
    chunk_tokens=st.sampled_from([None, 1, 7]),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients(source, kind, reduction, chunk_tokens, masked, seed):
    student, teacher, labels = operands(dtype=torch.float64, seed=seed)
    given_teacher, definition = teachers(teacher, labels)[source]
    form = Form(kind, 0.3, 1.0)
    options = {"kind": kind, "beta": 0.3, "reduction": reduction, "chunk_tokens": chunk_tokens}
    got = linear_kl(*student, teacher=given_teacher, labels=labels if masked else None, **options)
    kept = (labels != -100) if masked else torch.ones_like(labels, dtype=torch.bool)
    losses = definition(F.linear(*student), form)[kept]
    expected = losses.sum() if reduction == "sum" else losses.mean()
    torch.testing.assert_close(got, expected)
    found = torch.autograd.grad(got * 1.7, student)
    for ours, theirs in zip(found, torch.autograd.grad(expected * 1.7, student), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert all(t.grad is None for t in teacher)


@pytest.mark.parametrize("source", ["head", "logits", "top_k"])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.4, 0.6)])
def test_both_losses_from_one_set_of_logits(source, weights):
    (hidden, weight, bias), teacher, labels = operands(dtype=torch.float64)
    given_teacher, definition = teachers(teacher, labels)[source]
    found = linear_kl_and_cross_entropy(
        hidden,
        weight,
        labels,
        bias,
        teacher=given_teacher,
        divergence_weight=weights[0],
        cross_entropy_weight=weights[1],
        kind="reverse",
        chunk_tokens=5,
    )
    logits = F.linear(hidden, weight, bias)
    divergence = definition(logits, Form("reverse"))[labels != -100].sum()
    cross_entropy = F.cross_entropy(logits, labels, reduction="sum")
    total = weights[0] * divergence + weights[1] * cross_entropy
    for ours, theirs in ((found.divergence, divergence), (found.cross_entropy, cross_entropy), (found.total, total)):
        torch.testing.assert_close(ours, theirs)
    assert not found.divergence.requires_grad
    assert not found.cross_entropy.requires_grad
    student = (hidden, weight, bias)
    for ours, theirs in zip(
        torch.autograd.grad(found.total, student), torch.autograd.grad(total, student), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
@pytest.mark.parametrize("peak", PEAKS)
@pytest.mark.parametrize("k", [4, 49, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_peaked_teachers_cache(dtype, k, peak, kind):
    student, _, _ = operands(dtype=dtype)
    teacher = peaked(23, 50, peak).to(DEVICE)
    got = linear_kl(*student, teacher=TopK.of(teacher, k, 2.0), kind=kind, temperature=2.0, chunk_tokens=7)
    logits = F.linear(*student).double()
    expected = top_k_oracle(logits, teacher, k, Form(kind, temperature=2.0)).mean()
    close = {torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(got.double(), expected, rtol=close, atol=close / 10)
    for ours, theirs in zip(torch.autograd.grad(got, student), torch.autograd.grad(expected, student), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=close, atol=close * float(theirs.abs().max()))


@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
def test_nothing_labelled_costs_nan_and_pulls_at_nothing(kind):
    student, teacher, labels = operands()
    loss = linear_kl(*student, teacher=TeacherHead(*teacher), kind=kind, labels=torch.full_like(labels, -100))
    assert loss.isnan()
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, student))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("extra", [-5, 5])
def test_precisions_and_unequal_vocabularies(dtype, extra):
    student, teacher, _ = operands(dtype=dtype)
    weight = torch.randn(50 + extra, 11, device=DEVICE).to(dtype)
    got = linear_kl(*student[:2], teacher=TeacherHead(teacher[0], weight), reduction="sum")
    shared = min(50, 50 + extra)
    logits, theirs = F.linear(*student[:2]), F.linear(teacher[0], weight).detach()
    expected = naive.divergence(logits[:, :shared], theirs[:, :shared], Form("forward")).sum()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-3 if dtype != torch.float32 else 1e-5, atol=1e-3)
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    for ours, wanted in zip(
        torch.autograd.grad(got, student[:2]), torch.autograd.grad(expected, student[:2]), strict=True
    ):
        assert ours.dtype == dtype
        torch.testing.assert_close(
            ours.float(), wanted.float(), rtol=tolerance, atol=tolerance * float(wanted.abs().max())
        )


def test_no_tokens_and_leading_dimensions():
    (hidden, weight, _), (theirs, their_weight, _), _ = operands(24)
    empty = linear_kl(hidden[:0], weight, teacher=TeacherHead(theirs[:0], their_weight), reduction="sum")
    assert empty.item() == 0
    empty.backward()
    assert (weight.grad == 0).all()
    flat = linear_kl(hidden, weight, teacher=TeacherHead(theirs, their_weight))
    shaped = linear_kl(
        hidden.view(4, 6, -1), weight, teacher=TeacherHead(theirs.view(4, 6, -1), their_weight), chunk_tokens=7
    )
    torch.testing.assert_close(flat, shaped)


def test_bitwise_repeatable():
    student, teacher, _ = operands(200, 700, 16)
    found = []
    for _ in range(2):
        loss = linear_kl(*student, teacher=TeacherHead(*teacher), kind="js", chunk_tokens=64)
        found.append((loss, *torch.autograd.grad(loss, student)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_opcheck():
    student, teacher, labels = operands()
    constants = [t.detach() for t in teacher]
    arguments = (
        *student,
        labels.clamp(min=-1),
        *constants,
        None,
        None,
        None,
        0,
        "js",
        0.5,
        1.0,
        1.0,
        0.5,
        7,
        True,
        True,
        True,
    )
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(summed, arguments, test_utils=tests)


@pytest.mark.parametrize("source", ["head", "top_k", "tail"])
def test_compiles_whole(source):
    student, teacher, labels = operands()
    given_teacher, _ = teachers(teacher, labels)[source]

    def loss(hidden, weight):
        return linear_kl(hidden * 2, weight, teacher=given_teacher, labels=labels)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, got = loss(*student[:2]), compiled(*student[:2])
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, student[:2]), torch.autograd.grad(expected, student[:2]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts CPU storage")
def test_all_logits_never_exist():
    num_tokens, vocab_size = 2048, 4096
    student, teacher, _ = operands(num_tokens, vocab_size, 8)
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_kl(*student, teacher=TeacherHead(*teacher), chunk_tokens=16).backward()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert peak < 4 * num_tokens * vocab_size / 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4, 3)}, r"hidden \(4, 3\).*weight \(7, 2\)"),
        ({"weight": torch.zeros(7, 2).double()}, r"one floating dtype"),
        ({"labels": torch.zeros(5, dtype=torch.long)}, r"labels of shape \(4,\)"),
        ({"bias": torch.zeros(6)}, r"bias \(6,\)"),
        ({"teacher": TeacherHead(torch.zeros(5, 3), torch.zeros(7, 3))}, r"teacher hidden \(5, 3\)"),
        ({"teacher": TopK(torch.zeros(4, 2).long(), torch.zeros(4, 3))}, r"top-k indices \(4, 2\)"),
        ({"teacher": TopK(torch.zeros(4, 0).long(), torch.zeros(4, 0))}, r"k of 1 to 7"),
        ({"teacher": TopK(torch.zeros(4, 2).long(), torch.zeros(4, 2), torch.zeros(4, 1))}, r"log_tail \(4, 1\)"),
        ({"teacher": TeacherHead(torch.zeros(4, 3), torch.zeros(7, 3), top_k=8)}, r"top_k=8.*1 to 7"),
        ({"teacher": TopK(torch.zeros(4, 2).long(), torch.zeros(4, 2)), "kind": "mse"}, r"probabilities only"),
        ({"kind": "l2"}, r"'l2'"),
        ({"beta": 1.0}, r"beta=1.0"),
        ({"temperature": 0.0}, r"temperature=0.0"),
        ({"reduction": "none"}, r"'none'"),
        ({"chunk_tokens": 0}, r"chunk_tokens=0"),
        ({"weight": torch.zeros(7, 2, device="meta")}, r"devices"),
    ],
)
def test_errors_say_what_was_given(change, message):
    teacher = TeacherHead(torch.zeros(4, 3), torch.zeros(7, 3))
    given_arguments = {"hidden": torch.zeros(4, 2), "weight": torch.zeros(7, 2), "teacher": teacher}
    with pytest.raises(ValueError, match=message):
        linear_kl(**(given_arguments | change))


def test_labels_beyond_the_vocabulary():
    (hidden, weight, _), teacher, labels = operands()
    labels[0] = 50
    if DEVICE.type == "cpu":
        with pytest.raises(ValueError, match="label 50"):
            linear_kl_and_cross_entropy(
                hidden, weight, labels, teacher=TeacherHead(*teacher), divergence_weight=1.0, cross_entropy_weight=1.0
            )
