"""Checks for every implementation of the pass over two chunks of logits."""

import torch
from torch.nn import functional as F

from leanmill.kernels.linear_kl import naive


def assert_equals_definition(function, raw, teacher, labels, form, definition=naive.divergence):
    """Compare losses and written gradient with autograd through the definition in fp64."""
    exact = raw.double().requires_grad_()
    shared = min(raw.shape[-1], teacher.shape[-1]) if isinstance(teacher, torch.Tensor) else raw.shape[-1]
    theirs = (teacher.double()[:, :shared],) if isinstance(teacher, torch.Tensor) else teacher
    kept = labels >= 0
    value = torch.where(kept, definition(exact[:, :shared], *theirs, form), 0.0)
    of_labels = F.cross_entropy(exact, labels, ignore_index=-1, reduction="none")
    (form.divergence_weight * value + (form.cross_entropy_weight or 0.0) * of_labels).sum().backward()
    given = (teacher,) if isinstance(teacher, torch.Tensor) else (*teacher, None)
    untouched = raw.clone()
    function(untouched, *given, labels, form, wants_gradient=False)
    torch.testing.assert_close(untouched, raw, rtol=0, atol=0)
    written = raw.clone()
    found = function(written, *given, labels, form, wants_gradient=True)
    torch.testing.assert_close(found[0].double(), value.detach(), rtol=1e-5, atol=5e-6)
    if form.cross_entropy_weight is not None:
        torch.testing.assert_close(found[1].double(), of_labels.detach(), rtol=1e-5, atol=5e-6)
    step = torch.finfo(raw.dtype).eps
    torch.testing.assert_close(written.double(), exact.grad, rtol=max(step, 2e-5), atol=max(2e-6, step * 1e-3))


PEAKS = [0.0, 25.0, 60.0]
"""How far a teacher's first logit stands above the others; from 17 on they vanish in an fp32 sum."""


def top_k_oracle(student, teacher, k, form):
    """T^2 x the divergence over the k tokens and the rest, in fp64 with every bucket's log taken of logits."""
    taken = teacher.double().topk(k).indices
    is_taken = torch.zeros_like(teacher, dtype=torch.bool).scatter_(-1, taken, True)

    def buckets(logits):
        logs = (logits.double() / form.temperature).log_softmax(-1)
        rest = [logs.masked_fill(is_taken, -torch.inf).logsumexp(-1, keepdim=True)] if k < logits.shape[-1] else []
        return torch.cat([logs.gather(-1, taken), *rest], -1)

    def kl(log_p, log_q):
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    log_p, log_q, beta = buckets(teacher), buckets(student), form.beta
    share = 1 - beta if form.kind == "skew_reverse" else beta
    log_m = (share * log_p.exp() + (1 - share) * log_q.exp()).log()
    value = {
        "forward": lambda: kl(log_p, log_q),
        "reverse": lambda: kl(log_q, log_p),
        "js": lambda: beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m),
        "skew_forward": lambda: kl(log_p, log_m),
        "skew_reverse": lambda: kl(log_q, log_m),
        "total_variation": lambda: (log_p.exp() - log_q.exp()).abs().sum(-1) / 2,
        "blend": lambda: beta * kl(log_q, log_p) + (1 - beta) * kl(log_p, log_q),
    }[form.kind]()
    return form.temperature**2 * value


def peaked(num_rows, width, peak, dtype=torch.float32, seed=1):
    teacher = logits(num_rows, width, torch.float64, seed) / 3
    teacher[:, 0] = teacher.max() + peak
    return teacher.to(dtype)


def logits(num_rows, width, dtype=torch.float32, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_rows, width, generator=generator) * 3).to(device, dtype)
