"""Cross-entropy of rows of logits and its gradient written over them, in Triton.

One program a row: an online softmax reads it once (largest logit, sum of exponentials), a second
read turns it into the gradient. Rows up to a few megabytes are still in the L2 cache by then.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanmill.kernels.linear_cross_entropy.naive import Form


@triton.jit
def _logits(raw, factor, cap, HAS_CAP: tl.constexpr):
    z = raw.to(tl.float32) * factor
    if HAS_CAP:
        # tanh through exp of a negative number, which cannot overflow.
        e = tl.exp(-2.0 * tl.abs(z) / cap)
        t = (1.0 - e) / (1.0 + e)
        z = cap * tl.where(z < 0, -t, t)
    return z


@triton.jit
def _cross_entropy_rows(
    raw_ptr,
    labels_ptr,
    scales_ptr,
    losses_ptr,
    width,
    factor,
    cap,
    z_loss,
    smoothing,
    HAS_SCALES: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WANTS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A chunk of logits may hold 2^31 elements and more.
    row = tl.program_id(0).to(tl.int64)
    raw_ptr += row * width
    label = tl.load(labels_ptr + row)
    offsets = tl.arange(0, BLOCK)
    if label < 0:
        tl.store(losses_ptr + row, 0.0)
        if WANTS_GRADIENT:
            zeros = tl.zeros([BLOCK], tl.float32).to(raw_ptr.dtype.element_ty)
            for start in range(0, width, BLOCK):
                tl.store(raw_ptr + start + offsets, zeros, mask=start + offsets < width)
        return

    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    logits_sum = tl.zeros([BLOCK], tl.float32)
    is_nan = tl.zeros([BLOCK], tl.int32)
    for start in range(0, width, BLOCK):
        inside = start + offsets < width
        z = _logits(tl.load(raw_ptr + start + offsets, mask=inside, other=0.0), factor, cap, HAS_CAP)
        is_nan |= (inside & (z != z)).to(tl.int32)
        logits_sum += tl.where(inside, z, 0.0)
        z = tl.where(inside, z, float("-inf"))
        # A lane's own running maximum: no reduction over lanes inside the loop.
        new_top = tl.maximum(top, z)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - base) + tl.exp(z - base)
        top = new_top
    row_top = tl.max(top, axis=0)
    base = tl.where(row_top == float("-inf"), 0.0, row_top)
    sum_exp = tl.sum(total * tl.exp(top - base), axis=0)
    sum_exp = tl.where(tl.max(is_nan, axis=0) > 0, float("nan"), sum_exp)
    lse = row_top + tl.log(sum_exp)

    # A label past the vocabulary is an error that the host cannot see without waiting: NaN.
    target = _logits(tl.load(raw_ptr + label, mask=label < width, other=float("nan")), factor, cap, HAS_CAP)
    mean = tl.sum(logits_sum, axis=0) / width
    loss = lse - target
    if smoothing > 0.0:
        loss = (1.0 - smoothing) * loss + smoothing * (lse - mean)
    loss += z_loss * lse * lse
    tl.store(losses_ptr + row, loss)

    if WANTS_GRADIENT:
        outer = factor
        if HAS_SCALES:
            outer = factor * tl.load(scales_ptr + row).to(tl.float32)
        of_softmax = (1.0 + 2.0 * z_loss * lse) / sum_exp
        for start in range(0, width, BLOCK):
            columns = start + offsets
            inside = columns < width
            z = _logits(tl.load(raw_ptr + columns, mask=inside, other=0.0), factor, cap, HAS_CAP)
            g = tl.exp(z - row_top) * of_softmax - smoothing / width
            g = tl.where(columns == label, g - (1.0 - smoothing), g)
            if HAS_CAP:
                g = g * (1.0 - (z / cap) * (z / cap))
            tl.store(raw_ptr + columns, (g * outer).to(raw_ptr.dtype.element_ty), mask=inside)


def cross_entropy_(
    raw: Tensor, labels: Tensor, row_scales: Tensor | None, form: Form, *, wants_gradient: bool
) -> Tensor:
    """Do what `naive.cross_entropy_` does; a label past the last column makes its loss NaN."""
    losses = torch.empty(len(raw), dtype=torch.float32, device=raw.device)
    if len(raw) == 0:
        return losses
    block = block_size(raw.shape[-1])
    _cross_entropy_rows[(len(raw),)](
        raw,
        labels.contiguous(),
        losses if row_scales is None else row_scales.contiguous(),
        losses,
        raw.shape[-1],
        form.scale,
        form.softcap,
        form.z_loss,
        form.label_smoothing,
        HAS_SCALES=row_scales is not None,
        HAS_CAP=form.softcap > 0,
        WANTS_GRADIENT=wants_gradient,
        BLOCK=block,
        num_warps=max(4, block // 256),
    )
    return losses


def block_size(width: int) -> int:
    """Columns a program takes at once: few enough registers for two programs of 16 warps a processor."""
    return max(128, min(4096, triton.next_power_of_2(width)))
