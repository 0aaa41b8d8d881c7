"""Cross-entropy of a linear head whose vocabulary several ranks share: each makes the logits of its own rows.

Three numbers a token travel: the largest logit's place is taken by the ranks' own log-sum-exp, whose sum is then
exact, and the logit of the label is that of the one rank that has it (Megatron-LM, arXiv:1909.08053, section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leanmill.kernels.linear_cross_entropy import chunks
from leanmill.kernels.linear_cross_entropy.chunks import Wanted
from leanmill.kernels.linear_cross_entropy.naive import Form


Exchange = Callable[[Tensor], Tensor]
"""Given a tensor of each rank, of one shape: their element-wise sum, or maximum."""


def split_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    first_row: int,
    total: Exchange,
    largest: Exchange,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return the cross-entropy of each token, equal on all ranks; see `op.linear_cross_entropy`.

    Backward makes the logits again. The gradient of the hidden states is this rank's part of it, which the caller
    adds up over ranks; that of weight and bias is whole.

    Args:
        hidden: [N, H], equal on all ranks; fp32, bf16, fp16 or fp64.
        weight: [n, H], this rank's rows of the vocabulary.
        labels: [N] int64, of the whole vocabulary, or `ignore_index`.
        bias: [n] or None.
        first_row: Place of the first row here in the vocabulary.
        total: Sums over ranks.
        largest: Takes maxima over ranks.
        ignore_index: Label of tokens that cost nothing and get no gradient.
        logit_scale: s of logits c tanh(s x / c).
        softcap: c, or None.
        chunk_tokens: Tokens whose logits exist at once; None chooses by memory.

    Returns:
        [N], fp32 (fp64 for fp64).
    """
    form = Form(float(logit_scale), float(softcap or 0.0))
    rows = chunks.rows_a_chunk(hidden, weight, chunk_tokens)
    own = (labels - first_row).where(labels != ignore_index, -1)
    kept = labels != ignore_index
    losses: Tensor = _SplitLosses.apply(hidden, weight, bias, own, kept, form, rows, total, largest)
    return losses


class _SplitLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        own: Tensor,
        kept: Tensor,
        form: Form,
        chunk_rows: int,
        total: Exchange,
        largest: Exchange,
    ) -> Tensor:
        is_here = (own >= 0) & (own < weight.shape[0])
        targets = hidden.new_zeros(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))

        def row_loss(raw: Tensor, part: slice) -> Tensor:
            logits = form.logits(raw)
            at = own[part].where(is_here[part], 0).unsqueeze(-1)
            targets[part] = logits.gather(-1, at).squeeze(-1).where(is_here[part], 0.0)
            return logits.logsumexp(-1)

        nothing = Wanted(hidden=False, weight=False, bias=False)
        here = chunks.run(hidden, weight, bias, row_loss, nothing, chunk_rows).losses
        highest = largest(here)
        share, target = total(torch.stack([(here - highest).exp(), targets])).unbind()
        lse = highest + share.log()
        ctx.save_for_backward(hidden, weight, bias, own, kept, is_here, lse)
        ctx.form, ctx.chunk_rows = form, chunk_rows
        return (lse - target).where(kept, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_losses: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, own, kept, is_here, lse = ctx.saved_tensors
        form, of_losses = ctx.form, of_losses.where(kept, 0.0)

        def row_loss(raw: Tensor, part: slice) -> Tensor:
            logits = form.logits(raw)
            gradient = (logits - lse[part].unsqueeze(-1)).exp_()
            at = own[part].where(is_here[part], 0).unsqueeze(-1)
            gradient.scatter_add_(-1, at, -is_here[part].to(gradient.dtype).unsqueeze(-1))
            if form.softcap:
                gradient *= 1 - (logits / form.softcap).square()
            gradient *= form.scale * of_losses[part].unsqueeze(-1)
            # A row without a label may hold infinities, whose product with 0 is NaN.
            raw.copy_(gradient.where(kept[part].unsqueeze(-1), 0.0))
            return lse[part]

        wanted = Wanted(*ctx.needs_input_grad[:3])
        found = chunks.run(hidden, weight, bias, row_loss, wanted, ctx.chunk_rows)
        gradients = [None if g is None else g.to(hidden.dtype) for g in (found.hidden, found.weight, found.bias)]
        return (*gradients, *(None,) * 6)
