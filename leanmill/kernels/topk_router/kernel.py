"""The router in Triton: rows of logits stay in registers from the scores to the sums.

Each program writes the counts and sums of its rows to a place of its own; adding those up has one
order, so results repeat bitwise without atomics.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanmill.kernels.topk_router.settings import Settings


_ROWS_A_PROGRAM = 64
_TAKEN = tl.constexpr(-(2**31))
"""Below the rank of every key."""
_SIGMOIDS_ARE_EXPONENTIALS = tl.constexpr(-20.0)
"""Of logits with a smaller logsumexp, sigmoids equal exponentials in fp32."""


@triton.jit
def _scores(logits, valid, IS_SIGMOID: tl.constexpr):
    """Softmax, scores and logsumexp of rows [R, E]; zero where not valid."""
    largest = tl.max(tl.where(valid, logits, float("-inf")), axis=1)
    powers = tl.where(valid, tl.exp(logits - largest[:, None]), 0.0)
    total = tl.sum(powers, axis=1)
    soft = powers / total[:, None]
    scores = soft
    if IS_SIGMOID:
        scores = tl.where(valid, 1.0 / (1.0 + tl.exp(-logits)), 0.0)
    return soft, scores, largest + tl.log(total)


@triton.jit
def _ranks(keys):
    """Integers that order like the keys: NaN above everything, -0.0 with 0.0, all above `_TAKEN`."""
    bits = tl.where(keys == 0.0, 0.0, keys).to(tl.int32, bitcast=True)
    return tl.where(keys != keys, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _parts(soft, scores, logsum, IS_SIGMOID: tl.constexpr):
    """Shares of the scores in their sum; of sigmoids that are all exponentials in fp32, the softmax."""
    parts = soft
    if IS_SIGMOID:
        total = tl.sum(scores, axis=1)
        is_tiny = logsum < _SIGMOIDS_ARE_EXPONENTIALS
        parts = tl.where(is_tiny[:, None], soft, scores / tl.where(is_tiny, 1.0, total)[:, None])
    return parts


@triton.jit
def _log_score(logit, IS_SIGMOID: tl.constexpr):
    if IS_SIGMOID:
        return tl.minimum(logit, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(logit)))
    return logit


@triton.jit
def _route_kernel(
    logits_at,
    bias_at,
    index_at,
    weights_at,
    counts_at,
    sums_at,
    num_tokens,
    num_experts,
    top_k,
    scaling,
    HAS_BIAS: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    NORMALISE: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    expert = tl.arange(0, EXPERTS)
    choice = tl.arange(0, TOP_K)
    counts = tl.zeros((EXPERTS,), tl.int32)
    mean = tl.zeros((EXPERTS,), tl.float32)
    z = 0.0
    for step in range(ROUNDS):
        row = (tl.program_id(0) * ROUNDS + step) * ROWS + tl.arange(0, ROWS)
        valid = (row < num_tokens)[:, None] & (expert < num_experts)[None, :]
        at = row.to(tl.int64)[:, None] * num_experts + expert[None, :]
        logits = tl.load(logits_at + at, mask=valid, other=0.0).to(tl.float32)
        soft, scores, logsum = _scores(logits, (expert < num_experts)[None, :] & (row >= 0)[:, None], IS_SIGMOID)
        # Scores rise with logits: without a bias these rank the same, and where scores round to one number.
        keys = logits
        if HAS_BIAS:
            keys = scores + tl.load(bias_at + expert, mask=expert < num_experts, other=0.0).to(tl.float32)[None, :]
            keys = tl.where((logsum != logsum)[:, None], logits, keys)
        ranks = _ranks(keys)
        chosen = tl.zeros((ROWS, TOP_K), tl.int32)
        values = tl.zeros((ROWS, TOP_K), tl.float32) + float("-inf")
        taken = (expert >= num_experts)[None, :] & (row >= 0)[:, None]
        for k in range(top_k):
            free = tl.where(taken, _TAKEN, ranks)
            best_rank = tl.max(free, axis=1)
            best = tl.min(tl.where(free == best_rank[:, None], expert[None, :], EXPERTS), axis=1)
            is_chosen = expert[None, :] == best[:, None]
            taken = taken | is_chosen
            value = tl.sum(tl.where(is_chosen, logits if NORMALISE else scores, 0.0), axis=1)
            if NORMALISE:
                value = _log_score(value, IS_SIGMOID)
            chosen = tl.where(choice[None, :] == k, best[:, None], chosen)
            values = tl.where(choice[None, :] == k, value[:, None], values)
        if NORMALISE:
            powers = tl.exp(values - tl.max(values, axis=1)[:, None])
            values = powers / tl.sum(powers, axis=1)[:, None]
        out_at = row.to(tl.int64)[:, None] * top_k + choice[None, :]
        out_mask = (row < num_tokens)[:, None] & (choice < top_k)[None, :]
        tl.store(index_at + out_at, chosen.to(tl.int64), mask=out_mask)
        tl.store(weights_at + out_at, values * scaling, mask=out_mask)
        counts += tl.sum((taken & valid).to(tl.int32), axis=0)
        mean += tl.sum(tl.where(valid, _parts(soft, scores, logsum, IS_SIGMOID), 0.0), axis=0)
        z += tl.sum(tl.where(row < num_tokens, logsum * logsum, 0.0), axis=0)
    program = tl.program_id(0)
    tl.store(counts_at + program * num_experts + expert, counts, mask=expert < num_experts)
    tl.store(sums_at + program * (num_experts + 1) + 1 + expert, mean, mask=expert < num_experts)
    tl.store(sums_at + program * (num_experts + 1), z)


@triton.jit
def _route_backward_kernel(
    logits_at,
    index_at,
    grad_weights_at,
    grad_z_at,
    grad_mean_at,
    grad_at,
    num_tokens,
    num_experts,
    top_k,
    scaling,
    IS_SIGMOID: tl.constexpr,
    NORMALISE: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    expert = tl.arange(0, EXPERTS)
    is_expert = expert < num_experts
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_tokens
    valid = is_row[:, None] & is_expert[None, :]
    at = row.to(tl.int64)[:, None] * num_experts + expert[None, :]
    logits = tl.load(logits_at + at, mask=valid, other=0.0).to(tl.float32)
    soft, scores, logsum = _scores(logits, is_expert[None, :] & (row >= 0)[:, None], IS_SIGMOID)
    slope = 1.0 - scores if IS_SIGMOID else 1.0
    grad_mean = tl.load(grad_mean_at + expert, mask=is_expert, other=0.0)[None, :]
    shares = _parts(soft, scores, logsum, IS_SIGMOID)
    average = tl.sum(grad_mean * shares, axis=1)[:, None]
    grad = shares * slope * (grad_mean - average) / num_tokens
    grad += soft * (2.0 * logsum * tl.load(grad_z_at) / num_tokens)[:, None]
    # The chosen experts' weights and upstream gradients, at their experts' places.
    upstream = tl.zeros((ROWS, EXPERTS), tl.float32)
    is_chosen = (expert < 0)[None, :] & (row >= 0)[:, None]
    for k in range(top_k):
        place = row.to(tl.int64) * top_k + k
        best = tl.load(index_at + place, mask=is_row, other=-1)
        is_this = expert[None, :] == best[:, None]
        is_chosen = is_chosen | is_this
        upstream += tl.where(is_this, tl.load(grad_weights_at + place, mask=is_row, other=0.0)[:, None], 0.0)
    if NORMALISE:
        values = tl.where(is_chosen, _log_score(logits, IS_SIGMOID), -1e30)
        powers = tl.where(is_chosen, tl.exp(values - tl.max(values, axis=1)[:, None]), 0.0)
        divisor = tl.where(is_row, tl.sum(powers, axis=1), 1.0)
        weights = powers / divisor[:, None]
        along = tl.sum(weights * upstream, axis=1)[:, None]
        grad += scaling * weights * slope * (upstream - along)
    else:
        weights = tl.where(is_chosen, scores, 0.0)
        grad += scaling * weights * slope * upstream
        if not IS_SIGMOID:
            grad -= scaling * soft * tl.sum(weights * upstream, axis=1)[:, None]
    tl.store(grad_at + at, grad.to(grad_at.dtype.element_ty), mask=valid)


def topk_router(
    logits: Tensor, bias: Tensor | None, token_mask: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what `naive.topk_router` does."""
    num_tokens, num_experts = logits.shape
    top_k = settings.top_k
    rows, rounds = _rows(num_experts)
    num_programs = triton.cdiv(num_tokens, rows * rounds)
    index = logits.new_empty(num_tokens, top_k, dtype=torch.int64)
    weights = logits.new_empty(num_tokens, top_k, dtype=torch.float32)
    counts = logits.new_empty(num_programs, num_experts, dtype=torch.int32)
    sums = logits.new_empty(num_programs, num_experts + 1, dtype=torch.float32)
    if num_programs:
        _route_kernel[(num_programs,)](
            *(logits, logits if bias is None else bias.contiguous(), index, weights, counts, sums),
            *(num_tokens, num_experts, top_k, settings.scaling),
            HAS_BIAS=bias is not None,
            IS_SIGMOID=settings.is_sigmoid,
            NORMALISE=settings.normalise,
            ROWS=rows,
            EXPERTS=triton.next_power_of_2(num_experts),
            TOP_K=triton.next_power_of_2(top_k),
            ROUNDS=rounds,
            num_warps=4,
        )
    means = (sums.sum(0, dtype=torch.float64) / max(num_tokens, 1)).float()
    return weights, index, counts.sum(0, keepdim=True, dtype=torch.int64), means[0].clone(), means[None, 1:].clone()


def backward(
    logits: Tensor,
    index: Tensor,
    token_mask: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
    settings: Settings,
) -> Tensor:
    """Return what `naive.backward` does."""
    num_tokens, num_experts = logits.shape
    rows, _ = _rows(num_experts)
    grad_weights, grad_z, grad_mean = (grad.float().contiguous() for grad in grads)
    out = torch.empty_like(logits)
    if num_tokens:
        _route_backward_kernel[(triton.cdiv(num_tokens, rows),)](
            *(logits, index, grad_weights, grad_z, grad_mean, out),
            *(num_tokens, num_experts, settings.top_k, settings.scaling),
            IS_SIGMOID=settings.is_sigmoid,
            NORMALISE=settings.normalise,
            ROWS=rows,
            EXPERTS=triton.next_power_of_2(num_experts),
            num_warps=4,
        )
    return out


def _rows(num_experts: int) -> tuple[int, int]:
    """Rows held at once, so that they fit registers, and how often a program goes on to the next."""
    rows = max(1, min(_ROWS_A_PROGRAM, 2048 // triton.next_power_of_2(num_experts)))
    return rows, max(1, _ROWS_A_PROGRAM // rows)
