"""One entry for cross-entropy from hidden states and head weight, choosing the path by device and dtype."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from leanmill.kernels.dispatch import log_path
from leanmill.kernels.linear_cross_entropy import liger
from leanmill.kernels.linear_cross_entropy.naive import Form
from leanmill.kernels.linear_cross_entropy.operators import summed, token_losses
from leanmill.kernels.sharded import TokenLayout, is_dtensor, mean_over_kept


Reduction = Literal["sum", "mean", "none"]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return the cross-entropy of a linear head, never holding logits for all tokens.

    With x = W h + b, z = c tanh(s x / c) (z = s x without a cap), lse = logsumexp(z), a token costs

        (1 - e) (lse - z_label) + e (lse - mean(z)) + k lse^2

    where s is `logit_scale`, c `softcap`, e `label_smoothing` and k `z_loss` (Chowdhery et al. 2022,
    arXiv:2204.02311, section 5). Logits are made in the operands' dtype and everything after them in
    fp32. For `sum` and `mean` the gradients are built in the forward pass, chunk by chunk (as Liger
    does, Hsu et al. 2024, arXiv:2410.10989), with the weight's added up in fp32; `none` makes the
    logits again in backward.

    Hidden states and labels may be DTensors sharded on tokens. `none` then returns one placed like
    them, `sum` and `mean` a Replicate one over all tokens. Weight and bias are Replicate DTensors,
    whose gradient is a pending sum over ranks, or plain if they need none.

    Args:
        hidden: [..., H], fp32, bf16, fp16 or fp64.
        weight: [V, H], same dtype.
        labels: [...] int64 below V, or `ignore_index`.
        bias: [V], same dtype.
        ignore_index: Label of tokens that cost nothing and get no gradient.
        reduction: `sum`, `mean` over the tokens with a label (over none, NaN with a gradient of 0, as in torch), or
            `none`.
        logit_scale: s.
        softcap: c > 0, or None.
        z_loss: k >= 0.
        label_smoothing: e in [0, 1).
        chunk_tokens: Tokens whose logits exist at once; None chooses by memory.

    Returns:
        fp32 (fp64 for fp64): a scalar, or [...] for `none`.

    Raises:
        ValueError: Shapes, dtypes, devices, placements or ranges do not fit.
    """
    _check(hidden, weight, labels, bias)
    form = _form(logit_scale, softcap, z_loss, label_smoothing)
    if reduction not in ("sum", "mean", "none"):
        raise ValueError(f"reduction {reduction!r} is not known; use 'sum', 'mean' or 'none'")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1, or None")
    if is_dtensor(hidden):
        layout = TokenLayout.of("hidden", hidden)
        local_bias = None if bias is None else layout.whole("bias", bias)
        operands = (layout.local("hidden", hidden), layout.whole("weight", weight), layout.local("labels", labels))
        if reduction == "none":
            return layout.spread(_losses(*operands, local_bias, form, ignore_index, chunk_tokens))
        total = layout.total(_total(*operands, local_bias, form, ignore_index, chunk_tokens))
    elif reduction == "none":
        return _losses(hidden, weight, labels, bias, form, ignore_index, chunk_tokens)
    else:
        total = _total(hidden, weight, labels, bias, form, ignore_index, chunk_tokens)
    return mean_over_kept(total, labels, ignore_index) if reduction == "mean" else total


def _losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    form: Form,
    ignore_index: int,
    chunk_tokens: int | None,
) -> Tensor:
    rows = hidden.reshape(-1, hidden.shape[-1])
    settings = (form.scale, form.softcap, form.z_loss, form.label_smoothing, ignore_index, chunk_tokens or 0)
    return token_losses(rows, weight, bias, labels.reshape(-1), *settings).view(labels.shape)


def _total(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    form: Form,
    ignore_index: int,
    chunk_tokens: int | None,
) -> Tensor:
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    is_tracing = torch.compiler.is_compiling()
    # A rank may hold no tokens, with which Liger divides by zero.
    if liger.covers(rows.device.type, rows.dtype, form, chunk_tokens, is_tracing=is_tracing) and len(rows):
        log_path("linear_cross_entropy", "Liger")
        return liger.summed(rows, weight, bias, targets, ignore_index)
    settings = (form.scale, form.softcap, form.z_loss, form.label_smoothing, ignore_index, chunk_tokens or 0)
    track = torch.is_grad_enabled()
    wanted = [track and t is not None and t.requires_grad for t in (rows, weight, bias)]
    return summed(rows, weight, bias, targets, *settings, *wanted)[0]


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    given = f"hidden {_describe(hidden)}, weight {_describe(weight)}, labels {_describe(labels)}"
    tensors = [t for t in (hidden, weight, labels, bias) if t is not None]
    if any(is_dtensor(t) for t in tensors) and not is_dtensor(hidden):
        raise ValueError(
            f"{given}: hidden is plain and others are DTensors; for the loss of this rank's tokens call "
            f"weight.full_tensor(grad_placements=[Partial()] * mesh.ndim) and labels.to_local(), for that of all "
            f"give hidden as a DTensor sharded on tokens"
        )
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1] or weight.shape[0] < 1:
        raise ValueError(f"{given}: expected hidden [..., H] and weight [V, H] with one H and V >= 1")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"{given}: expected one label a hidden state, shape {tuple(hidden.shape[:-1])}")
    if labels.dtype != torch.int64:
        raise ValueError(f"{given}: labels must be int64; call labels.long()")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(f"{given}, bias {_describe(bias)}: expected bias [V] in the weight's dtype")
    if hidden.dtype not in _DTYPES or weight.dtype != hidden.dtype:
        raise ValueError(f"{given}: expected one dtype of fp32, bf16, fp16 and fp64; cast one of them")
    if len({t.device for t in tensors}) > 1:
        raise ValueError(f"devices {[str(t.device) for t in tensors]} differ; move all tensors to one")


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _form(logit_scale: float, softcap: float | None, z_loss: float, label_smoothing: float) -> Form:
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be above 0, or None for no cap")
    if not z_loss >= 0:
        raise ValueError(f"z_loss={z_loss} must be at least 0")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 1)")
    return Form(float(logit_scale), float(softcap or 0.0), float(z_loss), float(label_smoothing))


# The summed loss with the gradients of its sum.
