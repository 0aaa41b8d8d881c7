"""Divergence of two rows of logits and its gradient written over the student's, in Triton.

One program a row: an online softmax over both (and over the student's at T = 1 for cross-entropy), a
second read for the divergence and the sum of its slopes (see rows.py), and a third for the gradient.
All after the first come from the L2 cache.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanmill.kernels.linear_kl.naive import KINDS, Form


@triton.jit
def _normaliser(ptr, width, inverse, BLOCK: tl.constexpr):
    """Largest of the scaled logits and the log of the sum of their exponentials over it."""
    offsets = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    is_nan = tl.zeros([BLOCK], tl.int32)
    for start in range(0, width, BLOCK):
        inside = start + offsets < width
        z = tl.load(ptr + start + offsets, mask=inside, other=float("-inf")).to(tl.float32) * inverse
        is_nan |= (z != z).to(tl.int32)
        new_top = tl.maximum(top, z)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - base) + tl.exp(z - base)
        top = new_top
    row_top = tl.max(top, axis=0)
    base = tl.where(row_top == float("-inf"), 0.0, row_top)
    sum_exp = tl.sum(total * tl.exp(top - base), axis=0)
    sum_exp = tl.where(tl.max(is_nan, axis=0) > 0, float("nan"), sum_exp)
    return row_top, tl.log(sum_exp)


@triton.jit
def _times(mass, factor):
    return tl.where(mass == 0.0, 0.0, mass * factor)


@triton.jit
def _terms(student, teacher, beta, log_share, log_rest, KIND: tl.constexpr):
    """Of buckets with these log-masses: what each adds to the divergence, its slope, and q."""
    p, q = tl.exp(teacher), tl.exp(student)
    gap = teacher - student
    # log(m / p) and log(m / q) of the mixture; without mass on one side the gap is infinite.
    smaller_adds = tl.log(1.0 + tl.exp(-tl.abs(gap + (log_share - log_rest))))
    over_teacher = tl.maximum(log_share, log_rest - gap) + smaller_adds
    over_student = tl.maximum(log_rest, gap + log_share) + smaller_adds
    if KIND == 0:  # forward
        value = _times(p, gap)
        slope = -p
    elif KIND == 1:  # reverse
        value = _times(q, -gap)
        slope = value
    elif KIND == 2:  # js
        slope = (1.0 - beta) * _times(q, -over_student)
        value = beta * _times(p, -over_teacher) + slope
    elif KIND == 3:  # skew_forward
        value = _times(p, -over_teacher)
        slope = (beta - 1.0) * _times(q, tl.exp(-over_teacher))
    elif KIND == 4:  # skew_reverse
        value = _times(q, -over_student)
        slope = value - beta * _times(q, tl.exp(-over_student))
    elif KIND == 5:  # total_variation
        value = 0.5 * tl.abs(q - p)
        slope = tl.where(q > p, 0.5 * q, tl.where(q < p, -0.5 * q, 0.0 * (q - p)))
    else:  # blend
        reverse = beta * _times(q, -gap)
        value = reverse + (1.0 - beta) * _times(p, gap)
        slope = reverse - (1.0 - beta) * p
    return value, slope, q


@triton.jit
def _divergence_rows(
    raw_ptr,
    teacher_ptr,
    labels_ptr,
    divergences_ptr,
    cross_entropies_ptr,
    width,
    teacher_width,
    shared,
    inverse,
    temperature,
    beta,
    log_share,
    log_rest,
    divergence_weight,
    cross_entropy_weight,
    KIND: tl.constexpr,
    WANTS_CROSS_ENTROPY: tl.constexpr,
    WANTS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    raw_ptr += row * width
    teacher_ptr += row * teacher_width
    label = tl.load(labels_ptr + row)
    offsets = tl.arange(0, BLOCK)
    if label < 0:
        tl.store(divergences_ptr + row, 0.0)
        tl.store(cross_entropies_ptr + row, 0.0)
        if WANTS_GRADIENT:
            zeros = tl.zeros([BLOCK], tl.float32).to(raw_ptr.dtype.element_ty)
            for start in range(0, width, BLOCK):
                tl.store(raw_ptr + start + offsets, zeros, mask=start + offsets < width)
        return

    student_top, student_log, teacher_top, teacher_log = 0.0, 0.0, 0.0, 0.0
    if KIND != 7:
        student_top, student_log = _normaliser(raw_ptr, shared, inverse, BLOCK)
        teacher_top, teacher_log = _normaliser(teacher_ptr, shared, inverse, BLOCK)
    plain_top, plain_log = student_top, student_log
    if WANTS_CROSS_ENTROPY:
        plain_top, plain_log = _normaliser(raw_ptr, width, 1.0, BLOCK)
        target = tl.load(raw_ptr + label, mask=label < width, other=float("nan")).to(tl.float32)
        tl.store(cross_entropies_ptr + row, plain_log - (target - plain_top))
    else:
        tl.store(cross_entropies_ptr + row, 0.0)

    values = tl.zeros([BLOCK], tl.float32)
    slopes = tl.zeros([BLOCK], tl.float32)
    for start in range(0, shared, BLOCK):
        inside = start + offsets < shared
        s = tl.load(raw_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(teacher_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)
        if KIND == 7:  # mse
            values += (s - t) * (s - t)
        else:
            value, slope, q = _terms(
                (s * inverse - student_top) - student_log,
                (t * inverse - teacher_top) - teacher_log,
                beta,
                log_share,
                log_rest,
                KIND,
            )
            values += tl.where(inside, value, 0.0)
            slopes += tl.where(inside, slope, 0.0)
    total = tl.sum(values, axis=0)
    slope_sum = tl.sum(slopes, axis=0)
    if KIND == 7:
        tl.store(divergences_ptr + row, total / shared)
    else:
        tl.store(divergences_ptr + row, temperature * temperature * total)

    if WANTS_GRADIENT:
        for start in range(0, width, BLOCK):
            columns = start + offsets
            inside = columns < width
            compared = columns < shared
            raw = tl.load(raw_ptr + columns, mask=inside, other=0.0).to(tl.float32)
            t = tl.load(teacher_ptr + columns, mask=compared, other=0.0).to(tl.float32)
            if KIND == 7:
                g = (raw - t) * (2.0 / shared)
            else:
                value, slope, q = _terms(
                    (raw * inverse - student_top) - student_log,
                    (t * inverse - teacher_top) - teacher_log,
                    beta,
                    log_share,
                    log_rest,
                    KIND,
                )
                g = (slope - q * slope_sum) * temperature
            g = tl.where(compared, g * divergence_weight, 0.0)
            if WANTS_CROSS_ENTROPY:
                of_label = tl.exp((raw - plain_top) - plain_log) - tl.where(columns == label, 1.0, 0.0)
                g += cross_entropy_weight * of_label
            tl.store(raw_ptr + columns, g.to(raw_ptr.dtype.element_ty), mask=inside)


def divergence_(
    raw: Tensor, teacher: Tensor, labels: Tensor, form: Form, *, wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Do what `rows.divergence_` does; a label past the last column makes its cross-entropy NaN."""
    losses = torch.empty(2, len(raw), dtype=torch.float32, device=raw.device)
    if len(raw) == 0:
        return losses[0], losses[1]
    teacher = teacher.contiguous()
    block = block_size(raw.shape[-1])
    _divergence_rows[(len(raw),)](
        raw,
        teacher,
        labels.contiguous(),
        losses[0],
        losses[1],
        raw.shape[-1],
        teacher.shape[-1],
        min(raw.shape[-1], teacher.shape[-1]),
        1.0 / form.temperature,
        form.temperature,
        form.beta,
        math.log(form.teacher_share),
        math.log1p(-form.teacher_share),
        form.divergence_weight,
        form.cross_entropy_weight or 0.0,
        KIND=KINDS.index(form.kind),
        WANTS_CROSS_ENTROPY=form.cross_entropy_weight is not None,
        WANTS_GRADIENT=wants_gradient,
        BLOCK=block,
        num_warps=max(4, block // 256),
    )
    return losses[0], losses[1]


def block_size(width: int) -> int:
    """Columns a program takes at once: few enough registers for two programs of 16 warps a processor."""
    return max(128, min(4096, triton.next_power_of_2(width)))
