"""Masks drawn in C against the definition in fp64, with the noise of `leanmill.core.noise`."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from leanmill.core.noise import gumbel
from leanmill.kernels.sampled_mask import cpu
from leanmill.kernels.sampled_mask.draw import Draw
from leanmill.kernels.sampled_mask.op import covers, drawn


pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no C compiler")
DRAW = Draw(num_kept=2, group_size=4, scale=150.0, temperature=1.5, key=0x0123_4567_89AB_CDEF, first=0)
PATTERNS = [(1, 2), (2, 4), (3, 4), (1, 4), (4, 8), (3, 5), (1, 32)]


def expected(weight, logits, upstream, draw, pull):
    """Output and gradients of weight and logits, in fp64."""
    size = draw.group_size
    ways = list(itertools.combinations(range(size), draw.num_kept))
    kept = torch.zeros(len(ways), size, dtype=torch.float64)
    for row, way in enumerate(ways):
        kept[row, list(way)] = 1
    places = draw.first + torch.arange(logits.numel(), dtype=torch.int64).view(logits.shape)
    noise = gumbel(torch.tensor([draw.key]), places).double()
    leaf = logits.detach().double().requires_grad_()
    shares = ((leaf * draw.scale + noise) / draw.temperature).softmax(-1)
    mask = (shares @ kept).reshape(weight.shape)
    fixed = weight.detach().double()
    loss = (fixed * mask * upstream.double()).sum() - pull * (fixed * mask).square().sum()
    (to_logits,) = torch.autograd.grad(loss, leaf)
    return (fixed * mask).detach(), upstream.double() * mask.detach(), to_logits


def operands(shape, draw, dtype=torch.float32):
    torch.manual_seed(0)
    num_candidates = math.comb(draw.group_size, draw.num_kept)
    weight = torch.randn(*shape, draw.group_size * 3).to(dtype)
    return weight, torch.randn(*shape, 3, num_candidates) * 0.02, torch.randn(weight.shape).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_kept", "group_size"), PATTERNS)
@pytest.mark.parametrize("shape", [(1,), (43,), (2, 5)])
def test_values_and_gradients_are_the_definitions(num_kept, group_size, shape, dtype):
    draw = dataclasses.replace(DRAW, num_kept=num_kept, group_size=group_size)
    weight, logits, upstream = operands(shape, draw, dtype)
    weight.requires_grad_()
    logits.requires_grad_()
    pull = torch.tensor([0.3])
    assert covers(weight, logits, draw)
    out = drawn(weight, logits, draw, pull)
    out.backward(upstream)
    value, to_weight, to_logits = expected(weight, logits, upstream, draw, 0.3)
    close = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(out.double(), value, rtol=close, atol=close * 0.1)
    torch.testing.assert_close(weight.grad.double(), to_weight, rtol=close, atol=close * 0.1)
    # Of 16-bit weights too: the gradient of logits is summed in fp32.
    torch.testing.assert_close(logits.grad.double(), to_logits, rtol=2e-4, atol=2e-5 * to_logits.abs().max().item())
    assert pull.item() == 0.0


@pytest.mark.parametrize("first", [7, 2**31 - 20, 2**32 - 100, 3 * 2**32 + 5])
def test_noise_is_that_of_the_place_in_the_whole_tensor(first):
    draw = dataclasses.replace(DRAW, first=first)
    weight, logits, upstream = operands((43,), draw)
    value, *_ = expected(weight, logits, upstream, draw, 0.0)
    torch.testing.assert_close(drawn(weight, logits, draw, torch.zeros(1)).double(), value, rtol=1e-5, atol=1e-6)


def test_a_part_draws_what_the_whole_draws_there():
    weight, logits, _ = operands((40,), DRAW)
    whole = drawn(weight, logits, DRAW, torch.zeros(1))
    part = dataclasses.replace(DRAW, first=logits[:17].numel())
    assert torch.equal(drawn(weight[17:], logits[17:], part, torch.zeros(1)), whole[17:])


def test_what_is_no_number_stays_in_its_group():
    weight, logits, _ = operands((40,), DRAW)
    before = drawn(weight, logits, DRAW, torch.zeros(1))
    logits[3, 1, 2] = torch.nan
    out = drawn(weight, logits, DRAW, torch.zeros(1))
    assert out[3, 4:8].isnan().all()
    out[3, 4:8] = before[3, 4:8]
    assert torch.equal(out, before)


def test_logits_of_certain_masks_overflow_nothing():
    weight, logits, upstream = operands((5,), DRAW)
    draw = dataclasses.replace(DRAW, scale=500.0, temperature=1e-3)
    value, *_ = expected(weight, logits, upstream, draw, 0.0)
    logits.requires_grad_()
    out = drawn(weight, logits, draw, torch.zeros(1))
    out.backward(upstream)
    torch.testing.assert_close(out.double(), value, rtol=1e-3, atol=1e-5)
    assert logits.grad.isfinite().all()


def test_what_c_does_not_cover():
    weight, logits, _ = operands((5,), DRAW)
    assert not covers(weight.double(), logits, DRAW)
    assert not covers(weight, logits.double(), DRAW)
    assert not covers(weight, logits, dataclasses.replace(DRAW, key=-1))
    many = dataclasses.replace(DRAW, num_kept=5, group_size=11)
    assert not covers(*operands((2,), many)[:2], many)
