"""The C pass over two rows of logits against the definition in fp64, at its edges, and bit by bit again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leanmill.kernels.linear_kl import cpu, naive
from leanmill.kernels.linear_kl.naive import IN_TENSORS, Form
from leanmill.kernels.native.dtypes import SUFFIXES
from tests.kernels.linear_kl.rows import PEAKS, assert_equals_definition, logits, peaked, top_k_oracle


pytestmark = pytest.mark.skipif(cpu.library() is None, reason="needs a C compiler")
KINDS = [kind for kind in naive.KINDS if kind not in IN_TENSORS]
forms = st.builds(
    Form,
    st.sampled_from(KINDS),
    st.sampled_from([0.1, 0.5]),
    st.sampled_from([1.0, 2.5]),
    st.sampled_from([1.0, 0.3]),
    st.sampled_from([None, 0.0, 0.7]),
)
widths = st.sampled_from([2, 15, 16, 17, 100, 1023, 1024, 1025, 3000])


def some_labels(num_rows, width, seed):
    return torch.randint(-1, width, (num_rows,), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(1, 4),
    width=widths,
    extra=st.sampled_from([-1, 0, 0, 3, 1100]),
    dtypes=st.tuples(st.sampled_from(list(SUFFIXES)), st.sampled_from(list(SUFFIXES))),
    form=forms,
    seed=st.integers(0, 1000),
)
def test_equals_the_definition(num_rows, width, extra, dtypes, form, seed):
    raw, teacher = logits(num_rows, width, dtypes[0], seed), logits(num_rows, width + extra, dtypes[1], seed + 1)
    assert_equals_definition(cpu.divergence_, raw, teacher, some_labels(num_rows, width, seed), form)


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(1, 4),
    width=widths,
    k=st.sampled_from([1, 3, 1023, 1024]),
    dtype=st.sampled_from(list(SUFFIXES)),
    form=forms.filter(lambda form: form.kind != "mse"),
    seed=st.integers(0, 1000),
)
def test_a_cache_equals_the_definition(num_rows, width, k, dtype, form, seed):
    teacher = logits(num_rows, width, torch.float64, seed + 1) / form.temperature
    log_probs, indices = teacher.log_softmax(-1).topk(min(k, width - 1))
    labels = some_labels(num_rows, width, seed)
    raw = logits(num_rows, width, dtype, seed)
    assert_equals_definition(
        cpu.top_k_divergence_, raw, (indices, log_probs), labels, form, definition=naive.top_k_divergence
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mse"])
@pytest.mark.parametrize("peak", PEAKS)
@pytest.mark.parametrize("k", [3, 300])
def test_a_peaked_teacher(peak, kind, k):
    form, labels = Form(kind, 0.3), torch.zeros(3, dtype=torch.long)
    raw, teacher = logits(3, 300), peaked(3, 300, peak)
    exact = raw.double().requires_grad_()
    expected = top_k_oracle(exact, teacher, k, form)
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    if k == 300:
        got, _ = cpu.divergence_(raw, teacher, labels, form, wants_gradient=True)
    else:
        cache = naive.top_k_of(teacher, k, 1.0)
        got, _ = cpu.top_k_divergence_(raw, *cache, labels, form, wants_gradient=True)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(raw.double(), gradient, rtol=2e-5, atol=3e-6)


@pytest.mark.parametrize("kind", ["js", "skew_forward", "skew_reverse", "total_variation"])
@pytest.mark.parametrize("who", ["student", "teacher", "both"])
def test_tokens_that_one_rules_out(who, kind):
    raw, teacher = logits(2, 1300), logits(2, 1300, seed=1)
    if who != "teacher":
        raw[:, 100:1250] = -torch.inf
    if who != "student":
        teacher[:, 100:1250] = -torch.inf
    assert_equals_definition(cpu.divergence_, raw, teacher, torch.tensor([3, 1260]), Form(kind, 0.3))


def test_a_rest_without_mass():
    raw, indices = logits(2, 40), torch.tensor([[3, 7, 9], [1, 0, 5]])
    raw[0] = -torch.inf
    raw[0, [3, 7, 9]] = torch.tensor([0.5, 1.0, -0.5])
    cache = (indices, torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.2, 0.1]]).log(), torch.tensor([0.0, 0.1]).log())
    cpu.top_k_divergence_(raw, *cache, torch.tensor([3, 0]), Form("js", 0.3), wants_gradient=True)
    assert raw.isfinite().all()


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_shows_in_its_row_only(kind, who):
    raw, teacher = logits(2, 300), logits(2, 300, seed=1)
    (raw if who == "student" else teacher)[1, 200] = torch.nan
    found = cpu.divergence_(raw, teacher, torch.tensor([1, 1]), Form(kind), wants_gradient=True)
    assert found[0].isnan().tolist() == [False, True]
    assert raw[0].isfinite().all()


@pytest.mark.parametrize("top_k", [False, True])
def test_a_row_without_a_label_is_zeroed_whatever_it_holds(top_k):
    raw, form, labels = torch.full((1, 1030), torch.nan), Form("js", 0.5, 1.0, 1.0, 1.0), torch.tensor([-1])
    if top_k:
        cache = (torch.tensor([[1, 2]]), torch.tensor([[-1.0, -2.0]]), None)
        found = cpu.top_k_divergence_(raw, *cache, labels, form, wants_gradient=True)
    else:
        found = cpu.divergence_(raw, logits(1, 1030), labels, form, wants_gradient=True)
    assert [float(value) for value in found] == [0, 0]
    assert (raw == 0).all()


@pytest.mark.parametrize("kind", ["forward", "skew_forward"])
def test_bitwise_the_same_on_any_number_of_threads(kind):
    found, before = [], torch.get_num_threads()
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            raw = logits(67, 1100)
            labels = torch.zeros(67, dtype=torch.long)
            value, _ = cpu.divergence_(raw, logits(67, 1100, seed=1), labels, Form(kind, 0.1), wants_gradient=True)
            found.append((value, raw))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
