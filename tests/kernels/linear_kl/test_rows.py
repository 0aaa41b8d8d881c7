"""Tensor code for a chunk against the definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leanmill.kernels.linear_kl import naive, rows
from leanmill.kernels.linear_kl.naive import Form
from tests.kernels.linear_kl.rows import assert_equals_definition, logits


forms = st.builds(
    Form,
    st.sampled_from(["forward", "reverse", "js"]),
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
@given(num_rows=st.integers(1, 5), width=st.integers(2, 40), k=st.integers(1, 8), form=forms, seed=st.integers(0, 1000))
def test_top_k(num_rows, width, k, form, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, width, (num_rows,), generator=generator)
    teacher = logits(num_rows, width, torch.float64, seed + 1) / form.temperature
    log_probs, indices = teacher.log_softmax(-1).topk(min(k, width - 1))
    raw = logits(num_rows, width, torch.float64, seed)
    cache = (indices, log_probs)
    assert_equals_definition(rows.top_k_divergence_, raw, cache, labels, form, naive.top_k_divergence)


@pytest.mark.parametrize("kind", ["forward", "js"])
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
