"""The definition against cross-entropy and logsumexp written out token by token."""

import math

import pytest
import torch
from torch.nn import functional as F

from leanmill.kernels.linear_cross_entropy import naive
from leanmill.kernels.linear_cross_entropy.naive import Form


def operands(num_tokens=9, vocab_size=13, size=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(num_tokens, size, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab_size, size, generator=generator, dtype=dtype, requires_grad=True)
    bias = torch.randn(vocab_size, generator=generator, dtype=dtype, requires_grad=True)
    labels = torch.randint(vocab_size, (num_tokens,), generator=generator)
    labels[2] = -100
    return hidden, weight, bias, labels


def by_hand(hidden, weight, bias, label, form):
    """One token in Python floats."""
    if label == -100:
        return 0.0
    raw = [
        float(sum(h * w for h, w in zip(hidden, row, strict=True))) + float(b)
        for row, b in zip(weight, bias, strict=True)
    ]
    z = [form.scale * x for x in raw]
    z = [form.softcap * math.tanh(x / form.softcap) for x in z] if form.softcap else z
    lse = math.log(sum(math.exp(x) for x in z))
    uniform = sum(lse - x for x in z) / len(z)
    return (1 - form.label_smoothing) * (lse - z[label]) + form.label_smoothing * uniform + form.z_loss * lse**2


@pytest.mark.parametrize("form", [Form(), Form(scale=0.3, softcap=2.0, z_loss=0.1, label_smoothing=0.2)])
def test_a_token_costs_what_the_formula_says(form):
    hidden, weight, bias, labels = operands()
    got = naive.token_losses(hidden, weight, bias, labels, form, -100)
    rows = (hidden.tolist(), weight.tolist(), bias.tolist())
    expected = [by_hand(h, rows[1], rows[2], int(label), form) for h, label in zip(rows[0], labels, strict=True)]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_label_smoothing_is_torchs():
    hidden, weight, bias, labels = operands()
    got = naive.token_losses(hidden, weight, bias, labels, Form(label_smoothing=0.3), -100)
    expected = F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="none", label_smoothing=0.3)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("form", [Form(), Form(scale=0.3, softcap=2.0, z_loss=0.1, label_smoothing=0.2)])
def test_the_gradient_written_over_logits_is_autograds(form):
    *_, labels = operands()
    labels[labels < 0] = -1
    raw = torch.randn(9, 13, dtype=torch.float64, requires_grad=True)
    scales = torch.rand(9, dtype=torch.float64)
    identity = torch.eye(13, dtype=torch.float64)
    losses = naive.token_losses(raw, identity, None, labels, form, -1)
    (losses * scales).sum().backward()
    written = raw.detach().clone()
    got = naive.cross_entropy_(written, labels, scales, form, wants_gradient=True)
    torch.testing.assert_close(got, losses.detach())
    torch.testing.assert_close(written, raw.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("scales", [None, torch.float32, torch.float64])
def test_a_scale_that_fp32_cannot_hold_is_not_rounded(scales):
    labels, raw = torch.tensor([0, 2]), torch.zeros(2, 3, dtype=torch.float64)
    given = None if scales is None else torch.ones(2, dtype=scales)
    naive.cross_entropy_(raw, labels, given, Form(scale=0.1), wants_gradient=True)
    expected = torch.full((2, 3), 0.1 / 3, dtype=torch.float64)
    expected[[0, 1], labels] = -0.2 / 3
    torch.testing.assert_close(raw, expected, rtol=1e-15, atol=0)
