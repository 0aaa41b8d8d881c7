"""One check for every implementation of the pass over a chunk of logits."""

import torch

from leanmill.kernels.linear_cross_entropy import naive


def assert_equals_definition(function, raw, labels, scales, form):
    """Compare losses and written gradient with the definition in fp64 from the same logits."""
    exact = raw.double()
    expected = naive.cross_entropy_(
        exact, labels, None if scales is None else scales.double(), form, wants_gradient=True
    )
    untouched = raw.clone()
    losses = function(untouched, labels, scales, form, wants_gradient=False)
    torch.testing.assert_close(untouched, raw, rtol=0, atol=0)
    torch.testing.assert_close(losses.double(), expected, rtol=2e-6, atol=2e-6)
    written = raw.clone()
    losses = function(written, labels, scales, form, wants_gradient=True)
    torch.testing.assert_close(losses.double(), expected, rtol=2e-6, atol=2e-6)
    step = torch.finfo(raw.dtype).eps
    # One rounding to the logits' dtype, and fp32 before it.
    torch.testing.assert_close(written.double(), exact, rtol=max(step, 4e-6), atol=max(5e-7, step * 1e-3))
