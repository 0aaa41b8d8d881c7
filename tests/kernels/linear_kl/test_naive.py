"""The divergences against sums written out in Python floats."""

import math

import pytest
import torch

from leanmill.kernels.linear_kl import naive
from leanmill.kernels.linear_kl.naive import Form
from leanmill.kernels.linear_kl.op import TopK
from tests.kernels.linear_kl.rows import PEAKS, logits, peaked, top_k_oracle


FORMS = [Form("forward"), Form("reverse", temperature=2.0), Form("js", 0.3, 0.7)]


def softmax(logits, temperature):
    exps = [math.exp(x / temperature) for x in logits]
    return [e / sum(exps) for e in exps]


def by_hand(p, q, form):
    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    m = [form.beta * x + (1 - form.beta) * y for x, y in zip(p, q, strict=True)]
    value = {
        "forward": lambda: kl(p, q),
        "reverse": lambda: kl(q, p),
        "js": lambda: form.beta * kl(p, m) + (1 - form.beta) * kl(q, m),
    }[form.kind]()
    return form.temperature**2 * value


@pytest.mark.parametrize("form", FORMS)
def test_divergence_by_hand(form):
    student, teacher = torch.randn(2, 4, 9, dtype=torch.float64) * 2
    expected = [
        by_hand(softmax(t, form.temperature), softmax(s, form.temperature), form)
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    torch.testing.assert_close(naive.divergence(student, teacher, form), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("form", FORMS)
def test_top_k_by_hand(form):
    student, teacher = torch.randn(2, 4, 9, dtype=torch.float64) * 2
    log_probs, indices = (teacher / form.temperature).log_softmax(-1).topk(3)
    expected = []
    for row, index, cached in zip(student.tolist(), indices.tolist(), log_probs.tolist(), strict=True):
        p, q = [math.exp(x) for x in cached], softmax(row, form.temperature)
        taken = [q[i] for i in index]
        expected.append(by_hand([*p, 1 - sum(p)], [*taken, 1 - sum(taken)], form))
    got = naive.top_k_divergence(student, indices, log_probs, form)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("form", [*FORMS, Form("js", 0.999), Form("js", 1e-3, 2.0)])
@pytest.mark.parametrize("peak", PEAKS)
def test_top_k_of_everything_is_the_divergence(form, peak):
    student, teacher = logits(4, 9).requires_grad_(), peaked(4, 9, peak)
    log_probs, indices = naive.log_softmax(teacher, form.temperature).topk(9)
    got = naive.top_k_divergence(student, indices, log_probs, form)
    expected = naive.divergence(student, teacher, form)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    found, wanted = (torch.autograd.grad(value.sum(), student)[0] for value in (got, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", [*FORMS, Form("js", 0.999), Form("js", 1e-3, 2.0)])
@pytest.mark.parametrize("peak", PEAKS)
@pytest.mark.parametrize("k", [1, 3, 8])
def test_the_tail_of_a_peaked_teacher(form, peak, k):
    student, teacher = logits(4, 9).requires_grad_(), peaked(4, 9, peak)
    cache = TopK.of(teacher, k, form.temperature)
    got = naive.top_k_divergence(student, cache.indices, cache.log_probs, form, cache.log_tail)
    expected = top_k_oracle(student, teacher, k, form)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-6)
    found, wanted = (torch.autograd.grad(value.sum(), student)[0] for value in (got, expected))
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("dtype", "k"),
    [(torch.float32, 1), (torch.float32, 5), (torch.bfloat16, 1), (torch.float64, 1), (torch.float64, 5)],
)
@pytest.mark.parametrize("peak", PEAKS)
def test_mass_left_by_exact_log_probabilities(dtype, k, peak):
    teacher = peaked(4, 9, peak, torch.float64)
    others = (teacher[:, 1:] - teacher[:, :1]).sort(-1, descending=True).values
    # The largest is log(1 / (1 + others)), which softmax in any dtype rounds to 0 under the higher peaks.
    divisor = others.exp().sum(-1, keepdim=True).log1p()
    log_probs = torch.cat([-divisor, others[:, : k - 1] - divisor], -1).to(dtype)
    got = naive.log_mass_left(log_probs, 9)
    rounded = log_probs.double().tolist()
    exact = [math.log(-math.fsum([math.expm1(row[0]), *map(math.exp, row[1:])])) for row in rounded]
    torch.testing.assert_close(got, torch.tensor(exact, dtype=torch.float64).unsqueeze(-1), rtol=1e-9, atol=1e-9)
    near = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-9}[dtype]
    of_logits = (others[:, k - 1 :] - divisor).logsumexp(-1, keepdim=True)
    torch.testing.assert_close(got, of_logits, rtol=near, atol=near)


@pytest.mark.parametrize("peak", [21.0, 25.0, 60.0, 200.0])
def test_mass_that_rounding_hides_is_the_most_it_can_be(peak):
    teacher = torch.zeros(1, 50)
    teacher[0, 0] = peak
    log_probs = teacher.log_softmax(-1).topk(4).values
    assert log_probs[0, 0] == 0, "fp32 has nothing left of this tail"
    assert naive.log_mass_left(log_probs, 50).item() == pytest.approx(math.log(46) - peak, rel=1e-6)
    reverse = naive.top_k_divergence(torch.zeros(1, 50), torch.arange(4)[None], log_probs, Form("reverse"))
    expected = top_k_oracle(torch.zeros(1, 50), teacher, 4, Form("reverse"))
    torch.testing.assert_close(reverse.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
def test_a_cache_that_is_not_of_the_largest_keeps_the_mass_it_states(kind):
    student, log_probs = logits(1, 9), torch.tensor([[0.5, 0.2, 1e-9]]).log()
    got = naive.top_k_divergence(student, torch.tensor([[4, 2, 7]]), log_probs, Form(kind))
    q = student.double().softmax(-1)[0, [4, 2, 7]].tolist()
    expected = by_hand([0.5, 0.2, 1e-9, 0.3 - 1e-9], [*q, 1 - sum(q)], Form(kind))
    torch.testing.assert_close(got.item(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", [Form("forward"), Form("js")])
def test_tokens_that_the_teacher_rules_out(form):
    student = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 5, dtype=torch.float64)
    teacher[:, 3:] = -torch.inf
    value = naive.divergence(student, teacher, form)
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_tokens_that_both_rule_out(form):
    student, teacher = torch.randn(2, 2, 5, dtype=torch.float64)
    student[:, 3:] = teacher[:, 3:] = -torch.inf
    student.requires_grad_()
    value = naive.divergence(student, teacher, form)
    torch.testing.assert_close(value, naive.divergence(student[:, :3], teacher[:, :3], form))
    value.sum().backward()
    assert student.grad.isfinite().all()
