"""Tensor code for a chunk against the definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leanmill.kernels.linear_kl import naive, rows
from leanmill.kernels.linear_kl.naive import KINDS, Form
from leanmill.kernels.linear_kl.op import TopK
from tests.kernels.linear_kl.rows import PEAKS, assert_equals_definition, logits, peaked, top_k_oracle


forms = st.builds(
    Form,
    st.sampled_from(KINDS),
    st.sampled_from([0.2, 0.5]),
    st.sampled_from([1.0, 2.5]),
    st.sampled_from([1.0, 0.3]),
    st.sampled_from([None, 0.0, 0.7]),
)


@settings(max_examples=25, deadline=None)
@given(
    num_rows=st.integers(1, 5),
    width=st.integers(1, 60),
    extra=st.integers(-3, 3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    form=forms,
    seed=st.integers(0, 1000),
)
def test_divergence(num_rows, width, extra, dtype, form, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, width, (num_rows,), generator=generator)
    teacher = logits(num_rows, max(1, width + extra), torch.float32, seed + 1)
    assert_equals_definition(rows.divergence_, logits(num_rows, width, dtype, seed), teacher, labels, form)


@settings(max_examples=25, deadline=None)
@given(
    num_rows=st.integers(1, 5),
    width=st.integers(2, 40),
    k=st.integers(1, 8),
    form=forms.filter(lambda form: form.kind != "mse"),
    cached_in=st.sampled_from([torch.float64, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_top_k(num_rows, width, k, form, cached_in, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, width, (num_rows,), generator=generator)
    teacher = logits(num_rows, width, torch.float64, seed + 1) / form.temperature
    log_probs, indices = teacher.log_softmax(-1).topk(min(k, width - 1))
    raw = logits(num_rows, width, torch.float64, seed)
    cache = (indices, log_probs.to(cached_in))
    assert_equals_definition(rows.top_k_divergence_, raw, cache, labels, form, naive.top_k_divergence)


@pytest.mark.parametrize(
    "form",
    [
        Form("forward"),
        Form("reverse", 0.5, 2.0),
        Form("js", 0.5),
        Form("js", 0.999),
        Form("skew_forward", 0.1),
        Form("skew_reverse", 0.1),
        Form("total_variation"),
        Form("blend", 0.3),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("peak", PEAKS)
@pytest.mark.parametrize("k", [3, 11, 12])
def test_the_tail_of_a_peaked_teacher(k, peak, dtype, form):
    raw, teacher = logits(3, 12, dtype), peaked(3, 12, peak, torch.float64 if dtype == torch.float64 else torch.float32)
    exact = raw.to(torch.float64, copy=True).requires_grad_()
    expected = top_k_oracle(exact, teacher, k, form)
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    cache = TopK.of(teacher, k, form.temperature)
    given = (cache.indices, cache.log_probs, cache.log_tail, torch.zeros(3, dtype=torch.long), form)
    got, _ = rows.top_k_divergence_(raw, *given, wants_gradient=True)
    step = torch.finfo(dtype).eps
    close = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got.double(), expected, rtol=close, atol=close / 2)
    torch.testing.assert_close(raw.double(), gradient, rtol=max(step, 2 * close), atol=max(step * 1e-3, close / 2))


@pytest.mark.parametrize("who", ["student", "both"])
@pytest.mark.parametrize("k", [3, None])
@pytest.mark.parametrize("kind", ["js", "skew_forward", "skew_reverse", "total_variation"])
def test_tokens_that_the_student_rules_out(kind, k, who):
    raw, teacher = logits(3, 12), logits(3, 12, seed=1)
    raw[:, 4:9] = -torch.inf
    if who == "both":
        teacher[:, 4:9] = -torch.inf
    form, labels = Form(kind, 0.3), torch.tensor([1, 2, -1])
    if k is None:
        assert_equals_definition(rows.divergence_, raw, teacher, labels, form)
    else:
        cache = (teacher[:, 4:9].topk(k).indices + 4, teacher.log_softmax(-1)[:, 4:9].topk(k).values)
        assert_equals_definition(rows.top_k_divergence_, raw, cache, labels, form, naive.top_k_divergence)


@pytest.mark.parametrize("kind", ["forward", "js", "skew_forward", "skew_reverse", "total_variation"])
def test_tokens_that_the_teacher_rules_out(kind):
    teacher = logits(3, 20, torch.float64, 1)
    teacher[:, 7:9] = -torch.inf
    assert_equals_definition(
        rows.divergence_, logits(3, 20, torch.float64), teacher, torch.tensor([1, 2, -1]), Form(kind)
    )


def test_a_row_without_a_label_is_zeroed_whatever_it_holds():
    raw = torch.full((1, 6), torch.nan)
    found = rows.divergence_(raw, logits(1, 6), torch.tensor([-1]), Form("js", 0.5, 1.0, 1.0, 1.0), wants_gradient=True)
    assert found[0] == 0
    assert found[1] == 0
    assert (raw == 0).all()
