"""One check for every implementation of the pass over two chunks of logits."""

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
    given = (teacher,) if isinstance(teacher, torch.Tensor) else teacher
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


def logits(num_rows, width, dtype=torch.float32, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_rows, width, generator=generator) * 3).to(device, dtype)
