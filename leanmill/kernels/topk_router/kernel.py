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

from leanmill.kernels.topk_router.settings import Settings, num_counted


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
def _first_of(free, best_rank, expert, WIDTH: tl.constexpr):
    """Where the first of the best ranks [R] stands in rows [R, WIDTH], as bool; nowhere once all are taken."""
    first = tl.min(tl.where(free == best_rank[:, None], expert[None, :], WIDTH), axis=1)
    return first, (expert[None, :] == first[:, None]) & (best_rank > _TAKEN)[:, None]


@triton.jit
def _closed_groups(
    values, taken, group_of, num_groups, open_groups, num_best, EXPERTS: tl.constexpr, GROUPS: tl.constexpr
):
    """Experts outside of each row's groups with the largest sums of their best open values, bool [R, E]."""
    expert = tl.arange(0, EXPERTS)
    group = tl.arange(0, GROUPS)
    ranks = _ranks(values)
    sums = tl.zeros_like(tl.sum(values, axis=1))[:, None] + tl.where(group < num_groups, 0.0, 0.0)[None, :]
    is_open = (sums < 0.0) & (group >= 0)[None, :]
    for g in range(num_groups):
        others = taken | (group_of != g)[None, :]
        for _ in range(num_best):
            free = tl.where(others, _TAKEN, ranks)
            best_rank = tl.max(free, axis=1)
            _, is_first = _first_of(free, best_rank, expert, EXPERTS)
            others = others | is_first
            value = tl.sum(tl.where(is_first, values, 0.0), axis=1)
            sums += tl.where(group[None, :] == g, value[:, None], 0.0)
            is_open = is_open | ((group[None, :] == g) & (best_rank > _TAKEN)[:, None])
    group_ranks = tl.where(is_open, _ranks(sums), _TAKEN)
    is_closed = taken | (expert >= 0)[None, :]
    for _ in range(open_groups):
        best_rank = tl.max(group_ranks, axis=1)
        first, is_first = _first_of(group_ranks, best_rank, group, GROUPS)
        group_ranks = tl.where(is_first, _TAKEN, group_ranks)
        is_closed = is_closed & ((group_of[None, :] != first[:, None]) | (best_rank == _TAKEN)[:, None])
    return is_closed


@triton.jit
def _route_kernel(
    logits_at,
    bias_at,
    mask_at,
    index_at,
    weights_at,
    counts_at,
    sums_at,
    length,
    num_experts,
    top_k,
    num_groups,
    open_groups,
    num_best,
    scaling,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    NORMALISE: tl.constexpr,
    SUMS_SCORES: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    GROUPS: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    expert = tl.arange(0, EXPERTS)
    choice = tl.arange(0, TOP_K)
    counts = tl.zeros((EXPERTS,), tl.int32)
    mean = tl.zeros((EXPERTS,), tl.float32)
    z = 0.0
    programs_a_sequence = tl.cdiv(length, ROWS * ROUNDS)
    sequence = tl.program_id(0) // programs_a_sequence
    start = (tl.program_id(0) % programs_a_sequence) * ROWS * ROUNDS
    for step in range(ROUNDS):
        position = start + step * ROWS + tl.arange(0, ROWS)
        row = sequence.to(tl.int64) * length + position
        is_row = position < length
        is_counted = is_row
        if HAS_MASK:
            is_counted = is_row & (tl.load(mask_at + row, mask=is_row, other=0) != 0)
        is_expert = (expert < num_experts)[None, :] & (row >= 0)[:, None]
        at = row[:, None] * num_experts + expert[None, :]
        logits = tl.load(logits_at + at, mask=is_counted[:, None] & is_expert, other=0.0).to(tl.float32)
        soft, scores, logsum = _scores(logits, is_expert, IS_SIGMOID)
        # Scores rise with logits: without a bias these rank the same, and where scores round to one number.
        keys = logits
        if HAS_BIAS:
            keys = scores + tl.load(bias_at + expert, mask=expert < num_experts, other=0.0).to(tl.float32)[None, :]
            keys = tl.where((logsum != logsum)[:, None], logits, keys)
        ranks = _ranks(keys)
        chosen = tl.zeros((ROWS, TOP_K), tl.int32) + num_experts
        values = tl.zeros((ROWS, TOP_K), tl.float32) + float("-inf")
        taken = (logits == float("-inf")) | (keys == float("-inf")) | (expert >= num_experts)[None, :]
        if GROUPS > 1:
            group_of = expert // (num_experts // num_groups)
            group_values = scores if SUMS_SCORES else keys
            taken = taken | _closed_groups(
                group_values, taken, group_of, num_groups, open_groups, num_best, EXPERTS, GROUPS
            )
        is_chosen = (expert < 0)[None, :] & (row >= 0)[:, None]
        for k in range(top_k):
            free = tl.where(taken, _TAKEN, ranks)
            best_rank = tl.max(free, axis=1)
            best, is_this = _first_of(free, best_rank, expert, EXPERTS)
            taken = taken | is_this
            is_chosen = is_chosen | is_this
            value = tl.sum(tl.where(is_this, logits if NORMALISE else scores, 0.0), axis=1)
            if NORMALISE:
                value = _log_score(value, IS_SIGMOID)
            is_place = (choice[None, :] == k) & ((best_rank > _TAKEN) & is_counted)[:, None]
            chosen = tl.where(is_place, best[:, None], chosen)
            values = tl.where(is_place, value[:, None], values)
        if NORMALISE:
            powers = tl.exp(values - tl.max(values, axis=1)[:, None])
            values = powers / tl.sum(powers, axis=1)[:, None]
        out_at = row[:, None] * top_k + choice[None, :]
        out_mask = is_row[:, None] & (choice < top_k)[None, :]
        tl.store(index_at + out_at, chosen.to(tl.int64), mask=out_mask)
        tl.store(weights_at + out_at, tl.where(chosen < num_experts, values * scaling, 0.0), mask=out_mask)
        valid = is_counted[:, None] & is_expert
        counts += tl.sum((is_chosen & valid).to(tl.int32), axis=0)
        mean += tl.sum(tl.where(valid, _parts(soft, scores, logsum, IS_SIGMOID), 0.0), axis=0)
        z += tl.sum(tl.where(is_counted, logsum * logsum, 0.0), axis=0)
    program = tl.program_id(0)
    tl.store(counts_at + program * num_experts + expert, counts, mask=expert < num_experts)
    tl.store(sums_at + program * (num_experts + 1) + 1 + expert, mean, mask=expert < num_experts)
    tl.store(sums_at + program * (num_experts + 1), z)


@triton.jit
def _route_backward_kernel(
    logits_at,
    mask_at,
    index_at,
    grad_weights_at,
    grad_z_at,
    grad_mean_at,
    grad_at,
    num_tokens,
    length,
    num_experts,
    top_k,
    scaling,
    HAS_MASK: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    NORMALISE: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    expert = tl.arange(0, EXPERTS)
    is_expert = expert < num_experts
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_tokens
    is_counted = is_row
    if HAS_MASK:
        is_counted = is_row & (tl.load(mask_at + row, mask=is_row, other=0) != 0)
    valid = is_counted[:, None] & is_expert[None, :]
    at = row.to(tl.int64)[:, None] * num_experts + expert[None, :]
    logits = tl.load(logits_at + at, mask=valid, other=0.0).to(tl.float32)
    soft, scores, logsum = _scores(logits, is_expert[None, :] & (row >= 0)[:, None], IS_SIGMOID)
    slope = 1.0 - scores if IS_SIGMOID else 1.0
    # Both are gradients of sums over tokens.
    grad_mean = tl.load(grad_mean_at + (row // length)[:, None] * num_experts + expert[None, :], mask=valid, other=0.0)
    shares = _parts(soft, scores, logsum, IS_SIGMOID)
    average = tl.sum(grad_mean * shares, axis=1)[:, None]
    grad = shares * slope * (grad_mean - average)
    grad += soft * (2.0 * logsum * tl.load(grad_z_at))[:, None]
    # The chosen experts' weights and upstream gradients, at their experts' places.
    upstream = tl.zeros((ROWS, EXPERTS), tl.float32)
    is_chosen = (expert < 0)[None, :] & (row >= 0)[:, None]
    for k in range(top_k):
        place = row.to(tl.int64) * top_k + k
        best = tl.load(index_at + place, mask=is_row, other=-1)
        is_this = (expert[None, :] == best[:, None]) & is_expert[None, :]
        is_chosen = is_chosen | is_this
        upstream += tl.where(is_this, tl.load(grad_weights_at + place, mask=is_row, other=0.0)[:, None], 0.0)
    if NORMALISE:
        values = tl.where(is_chosen, _log_score(logits, IS_SIGMOID), -1e30)
        powers = tl.where(is_chosen, tl.exp(values - tl.max(values, axis=1)[:, None]), 0.0)
        total = tl.sum(powers, axis=1)
        weights = powers / tl.where(total == 0.0, 1.0, total)[:, None]
        along = tl.sum(weights * upstream, axis=1)[:, None]
        grad += scaling * weights * slope * (upstream - along)
    else:
        weights = tl.where(is_chosen, scores, 0.0)
        grad += scaling * weights * slope * upstream
        if not IS_SIGMOID:
            grad -= scaling * soft * tl.sum(weights * upstream, axis=1)[:, None]
    grad = tl.where(valid, grad, 0.0)
    tl.store(grad_at + at, grad.to(grad_at.dtype.element_ty), mask=is_row[:, None] & is_expert[None, :])


def topk_router(
    logits: Tensor, bias: Tensor | None, token_mask: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what `naive.topk_router` does."""
    num_tokens, num_experts = logits.shape
    num_sequences, top_k = settings.num_sequences, settings.top_k
    rows, rounds = _rows(num_experts)
    num_programs = triton.cdiv(num_tokens // num_sequences, rows * rounds) * num_sequences
    index = logits.new_empty(num_tokens, top_k, dtype=torch.int64)
    weights = logits.new_empty(num_tokens, top_k, dtype=torch.float32)
    counts = logits.new_empty(num_programs, num_experts, dtype=torch.int32)
    sums = logits.new_empty(num_programs, num_experts + 1, dtype=torch.float32)
    if num_programs:
        _route_kernel[(num_programs,)](
            *(logits, logits if bias is None else bias.contiguous(), _mask_operand(token_mask, logits)),
            *(index, weights, counts, sums, num_tokens // num_sequences, num_experts, top_k),
            *(settings.num_groups, settings.open_groups, settings.num_best, settings.scaling),
            HAS_BIAS=bias is not None,
            HAS_MASK=token_mask is not None,
            IS_SIGMOID=settings.is_sigmoid,
            NORMALISE=settings.normalise,
            SUMS_SCORES=bias is None and settings.num_best > 1,
            ROWS=rows,
            EXPERTS=triton.next_power_of_2(num_experts),
            TOP_K=triton.next_power_of_2(top_k),
            GROUPS=triton.next_power_of_2(settings.num_groups),
            ROUNDS=rounds,
            num_warps=4,
        )
    by_sequence = sums.view(num_sequences, -1, num_experts + 1).sum(1, dtype=torch.float64)
    counted = num_counted(logits, token_mask, settings)
    z_loss = by_sequence[:, 0].sum() / counted.sum().clamp(min=1)
    means = by_sequence[:, 1:] / counted.clamp(min=1).unsqueeze(-1)
    counts = counts.view(num_sequences, -1, num_experts).sum(1, dtype=torch.int64)
    return weights, index, counts, z_loss.float(), means.float()


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
    grad_weights, grad_z, grad_mean = (grad.float() for grad in grads)
    counted = num_counted(logits, token_mask, settings)
    grad_z = grad_z / counted.sum().clamp(min=1)
    grad_mean = grad_mean / counted.clamp(min=1).unsqueeze(-1)
    out = torch.empty_like(logits)
    if num_tokens:
        _route_backward_kernel[(triton.cdiv(num_tokens, rows),)](
            *(logits, _mask_operand(token_mask, logits), index, grad_weights.contiguous(), grad_z, grad_mean, out),
            *(num_tokens, num_tokens // settings.num_sequences, num_experts, settings.top_k, settings.scaling),
            HAS_MASK=token_mask is not None,
            IS_SIGMOID=settings.is_sigmoid,
            NORMALISE=settings.normalise,
            ROWS=rows,
            EXPERTS=triton.next_power_of_2(num_experts),
            num_warps=4,
        )
    return out


def _mask_operand(token_mask: Tensor | None, logits: Tensor) -> Tensor:
    """The mask as bytes; any pointer where there is none."""
    return logits if token_mask is None else token_mask.contiguous().view(torch.uint8)


def _rows(num_experts: int) -> tuple[int, int]:
    """Rows held at once, so that they fit registers, and how often a program goes on to the next."""
    rows = max(1, min(_ROWS_A_PROGRAM, 2048 // triton.next_power_of_2(num_experts)))
    return rows, max(1, _ROWS_A_PROGRAM // rows)
