"""The divergences against sums written out in Python floats."""

import math

import pytest
import torch

from leanmill.kernels.linear_kl import naive
from leanmill.kernels.linear_kl.naive import Form


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


def test_top_k_of_everything_is_the_divergence():
    student, teacher = torch.randn(2, 4, 9, dtype=torch.float64)
    log_probs, indices = teacher.log_softmax(-1).topk(9)
    got = naive.top_k_divergence(student, indices, log_probs, FORMS[0])
    torch.testing.assert_close(got, naive.divergence(student, teacher, FORMS[0]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", [Form("forward"), Form("js")])
def test_tokens_that_the_teacher_rules_out(form):
    student = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 5, dtype=torch.float64)
    teacher[:, 3:] = -torch.inf
    value = naive.divergence(student, teacher, form)
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad.isfinite().all()
