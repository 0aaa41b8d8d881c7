"""One entry for the router, differentiable, on every device."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from leanmill.kernels.dispatch import choose, implementation
from leanmill.kernels.native.dtypes import SUFFIXES
from leanmill.kernels.sharded import TokenLayout, is_dtensor
from leanmill.kernels.topk_router import cpu


class Routed(NamedTuple):
    """What a router decides and what its losses need."""

    weights: Tensor
    """[T, K] fp32: combine weights, differentiable."""
    experts: Tensor
    """[T, K] int64: chosen experts, best first."""
    counts: Tensor
    """[E] int64: copies each expert takes."""
    z_loss: Tensor
    """Scalar fp32: mean over tokens of logsumexp(logits)^2, differentiable."""
    mean_probability: Tensor
    """[E] fp32: mean over tokens of the scores, which for sigmoid are divided by their sum first;
    differentiable. A load-balance loss is E * sum(counts / (K T) * mean_probability)."""


def topk_router(
    logits: Tensor,
    top_k: int,
    *,
    score: Literal["softmax", "sigmoid"] = "softmax",
    normalise: bool = True,
    bias: Tensor | None = None,
    scaling: float = 1.0,
) -> Routed:
    """Choose `top_k` experts for each token.

    Scores s are the softmax or the sigmoid of the logits in fp32. Chosen are the largest of s + bias
    (ties: the lower expert); weights are s over the chosen, divided by their sum if `normalise`, times
    `scaling`. Without a bias the logits choose, which is the same and tells apart scores that round to
    one number. NaN logits count as largest; they also choose for a token whose softmax is NaN, whatever
    the bias.

    Quotients of scores are taken of logarithms: no constant is added to a sum, with which a sigmoid
    router could lower its balance loss by shrinking all scores, and it cannot underflow: where all
    sigmoids of a token vanish, weights, mean probability and gradients are those of its softmax, their
    limit.

    Args:
        logits: [T, E] fp32, bf16, fp16 or fp64 (then outputs are fp64). Of a DTensor sharded on tokens,
            weights and experts are placed like it; counts and means are those of all tokens, Replicate.
        top_k: Experts a token, 1 to E.
        score: `softmax` (Switch, Mixtral, Qwen3-MoE) or `sigmoid` (DeepSeek-V3).
        normalise: Whether weights of a token sum to `scaling`.
        bias: [E], added for the choice only; no gradient (Wang et al., 2024). Plain, or, with such
            logits, a Replicate DTensor.
        scaling: Factor of the weights.

    Raises:
        ValueError: Shapes, dtypes, values or placements outside of this.
    """
    _check(logits, top_k, score, bias)
    settings = (top_k, score == "sigmoid", normalise, float(scaling))
    if is_dtensor(logits):
        return _on_shards(logits, bias, settings)
    return Routed(*_route(logits, bias, *settings))


def _on_shards(logits: Tensor, bias: Tensor | None, settings: tuple[int, bool, bool, float]) -> Routed:
    """Route each rank's tokens; a rank's means weigh as much as its share of all tokens."""
    layout = TokenLayout.of("logits", logits)
    local = layout.local("logits", logits)
    whole_bias = None if bias is None else layout.whole("bias", bias.detach())
    found = Routed(*_route(local, whole_bias, *settings))
    share = local.shape[0] / max(logits.shape[0], 1)
    return Routed(
        layout.spread(found.weights),
        layout.spread(found.experts),
        layout.total(found.counts),
        layout.total(found.z_loss * share),
        layout.total(found.mean_probability * share),
    )


def _check(logits: Tensor, top_k: int, score: str, bias: Tensor | None) -> None:
    if is_dtensor(bias) and not is_dtensor(logits):
        raise ValueError(
            "bias is a DTensor and logits are plain; pass bias.full_tensor() to route this rank's tokens alone, or "
            "logits as a DTensor sharded on tokens to route those of all ranks"
        )
    if logits.dim() != 2 or logits.dtype not in (*SUFFIXES, torch.float64):
        raise ValueError(f"logits are {logits.dtype} {tuple(logits.shape)}; they must be floating [T, E]")
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k is {top_k} for logits {tuple(logits.shape)}; it must be 1 to {logits.shape[1]}")
    if score not in ("softmax", "sigmoid"):
        raise ValueError(f"score is {score!r}; allowed: 'softmax', 'sigmoid'")
    if bias is not None and (bias.shape != logits.shape[1:] or bias.device != logits.device):
        raise ValueError(
            f"bias {tuple(bias.shape)} on {bias.device} must be [{logits.shape[1]}] on {logits.device}, as the logits"
        )


def _path(logits: Tensor) -> ModuleType:
    """The module that computes for these tensors."""
    return implementation(__package__, choose("topk_router", logits, c=cpu.library))


@torch.library.custom_op("leanmill::topk_router", mutates_args=())
def _route(
    logits: Tensor, bias: Tensor | None, top_k: int, is_sigmoid: bool, normalise: bool, scaling: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = {"is_sigmoid": is_sigmoid, "normalise": normalise, "scaling": scaling}
    return _path(logits).topk_router(logits.contiguous(), bias, top_k, **options)  # type: ignore[no-any-return]


@_route.register_fake
def _(
    logits: Tensor, bias: Tensor | None, top_k: int, is_sigmoid: bool, normalise: bool, scaling: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    num_tokens, num_experts = logits.shape
    index = logits.new_empty(num_tokens, top_k, dtype=torch.int64)
    weights = logits.new_empty(num_tokens, top_k, dtype=wide)
    counts = logits.new_empty(num_experts, dtype=torch.int64)
    return weights, index, counts, logits.new_empty((), dtype=wide), logits.new_empty(num_experts, dtype=wide)


@torch.library.custom_op("leanmill::topk_router_backward", mutates_args=())
def _route_backward(
    logits: Tensor,
    index: Tensor,
    grad_weights: Tensor,
    grad_z: Tensor,
    grad_mean: Tensor,
    is_sigmoid: bool,
    normalise: bool,
    scaling: float,
) -> Tensor:
    grads = (grad_weights, grad_z, grad_mean)
    options = {"is_sigmoid": is_sigmoid, "normalise": normalise, "scaling": scaling}
    return _path(logits).backward(logits.contiguous(), index.contiguous(), grads, **options)  # type: ignore[no-any-return]


@_route_backward.register_fake
def _(
    logits: Tensor,
    index: Tensor,
    grad_weights: Tensor,
    grad_z: Tensor,
    grad_mean: Tensor,
    is_sigmoid: bool,
    normalise: bool,
    scaling: float,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, _, *ctx.options = inputs
    ctx.save_for_backward(logits, output[1])


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    logits, index = ctx.saved_tensors
    grad_weights, _, _, grad_z, grad_mean = grads
    return _route_backward(logits, index, grad_weights, grad_z, grad_mean, *ctx.options), *(None,) * 5


_route.register_autograd(_backward, setup_context=_save)
