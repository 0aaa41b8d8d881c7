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
from leanmill.kernels.topk_router.settings import Settings


class Groups(NamedTuple):
    """Neighbouring experts in equal groups, of which each token may choose from the best.

    Limits how many devices or nodes a token is sent to (DeepSeek-V2, arXiv:2405.04434, 2.2.2; V3,
    arXiv:2412.19437, 2.1.2). Experts of other groups are closed to the token, whatever their scores.
    """

    num_groups: int
    """Must divide the number of experts."""
    open_groups: int
    """How many a token may choose from; together they must hold top_k experts."""
    num_best: int = 1
    """A group's score is the sum of this many best scores + bias in it: 1 in V2, 2 in V3."""


class Routed(NamedTuple):
    """What a router decides and what its losses need."""

    weights: Tensor
    """[T, K] fp32: combine weights, differentiable; 0 where a place is left empty."""
    experts: Tensor
    """[T, K] int64: chosen experts, best first; E where a place is left empty."""
    counts: Tensor
    """[E] or [S, E] int64: copies each expert takes."""
    z_loss: Tensor
    """Scalar fp32: mean over tokens of logsumexp(logits)^2, differentiable."""
    mean_probability: Tensor
    """[E] or [S, E] fp32: mean over tokens of the scores, which for sigmoid are divided by their sum first;
    differentiable. A load-balance loss is E * sum(counts / (K T) * mean_probability)."""


def topk_router(
    logits: Tensor,
    top_k: int,
    *,
    score: Literal["softmax", "sigmoid"] = "softmax",
    normalise: bool = True,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    groups: Groups | None = None,
    token_mask: Tensor | None = None,
    num_sequences: int | None = None,
) -> Routed:
    """Choose `top_k` experts for each token.

    Scores s are the softmax or the sigmoid of the logits in fp32. Chosen are the largest of s + bias
    (ties: the lower expert); weights are s over the chosen, divided by their sum if `normalise`, times
    `scaling`. A softmax over the chosen logits alone, as of GPT-OSS, is the normalised softmax over all.
    Without a bias the logits choose, which is the same and tells apart scores that round to
    one number. NaN logits count as largest; they also choose for a token whose softmax is NaN, whatever
    the bias.

    A logit of -inf closes the expert to the token: it has no share in any score, and is never chosen.
    Places are left empty where fewer than `top_k` experts are open to a token, and all of a masked token.

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
        groups: Limits the choice to some groups of experts; None does not.
        token_mask: bool [T]: False for tokens that are not routed, which padding is; they count nowhere and
            have no gradient. For plain logits.
        num_sequences: S, equal parts of neighbouring tokens: counts and mean probability are then each
            sequence's own, [S, E]. For plain logits.

    Raises:
        ValueError: Shapes, dtypes, values or placements outside of this.
    """
    _check(logits, top_k, score, bias, groups)
    _check_tokens(logits, token_mask, num_sequences)
    groups = Groups(1, 1) if groups is None else groups
    settings = Settings(top_k, score == "sigmoid", normalise, float(scaling), *groups, num_sequences or 1)
    if is_dtensor(logits):
        return _on_shards(logits, bias, settings)
    found = _routed(logits, bias, token_mask, settings)
    return found if num_sequences else _of_one_sequence(found)


def _routed(logits: Tensor, bias: Tensor | None, token_mask: Tensor | None, settings: Settings) -> Routed:
    return Routed(*_route(logits, bias, token_mask, settings.scaling, settings.numbers()))


def _of_one_sequence(routed: Routed) -> Routed:
    return routed._replace(counts=routed.counts[0], mean_probability=routed.mean_probability[0])


def _on_shards(logits: Tensor, bias: Tensor | None, settings: Settings) -> Routed:
    """Route each rank's tokens; a rank's means weigh as much as its share of all tokens."""
    layout = TokenLayout.of("logits", logits)
    local = layout.local("logits", logits)
    whole_bias = None if bias is None else layout.whole("bias", bias.detach())
    found = _of_one_sequence(_routed(local, whole_bias, None, settings))
    share = local.shape[0] / max(logits.shape[0], 1)
    return Routed(
        layout.spread(found.weights),
        layout.spread(found.experts),
        layout.total(found.counts),
        layout.total(found.z_loss * share),
        layout.total(found.mean_probability * share),
    )


def _check(logits: Tensor, top_k: int, score: str, bias: Tensor | None, groups: Groups | None) -> None:
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
    if groups is not None:
        check_groups(groups, logits.shape[1], top_k)


def check_groups(groups: Groups, num_experts: int, top_k: int) -> None:
    """Refuse groups that are not equal, or that leave a token fewer than `top_k` experts.

    Raises:
        ValueError: See above; the message says what is allowed.
    """
    if groups.num_groups < 1 or num_experts % groups.num_groups:
        divisors = [d for d in range(1, num_experts + 1) if num_experts % d == 0]
        raise ValueError(f"{groups.num_groups} groups do not divide {num_experts} experts; allowed: {divisors}")
    size = num_experts // groups.num_groups
    if not 1 <= groups.num_best <= size:
        raise ValueError(f"a group of {size} experts has no sum of its best {groups.num_best}; allowed: 1 to {size}")
    least = -(-top_k // size)
    if not least <= groups.open_groups <= groups.num_groups:
        raise ValueError(
            f"{groups.open_groups} open groups of {size} experts for top_k {top_k}; allowed: {least} to "
            f"{groups.num_groups}"
        )


def _check_tokens(logits: Tensor, token_mask: Tensor | None, num_sequences: int | None) -> None:
    if is_dtensor(logits) and (token_mask is not None or num_sequences is not None):
        raise ValueError("token_mask and num_sequences are for plain logits; pass logits.to_local() of each rank")
    if token_mask is not None and (token_mask.dtype != torch.bool or token_mask.shape != logits.shape[:1]):
        raise ValueError(
            f"token_mask is {token_mask.dtype} {tuple(token_mask.shape)}; it must be bool [{logits.shape[0]}]"
        )
    if num_sequences is not None and (num_sequences < 1 or logits.shape[0] % num_sequences):
        raise ValueError(f"{num_sequences} sequences do not divide {logits.shape[0]} tokens")


def _path(logits: Tensor) -> ModuleType:
    """The module that computes for these tensors."""
    return implementation(__package__, choose("topk_router", logits, c=cpu.library))


@torch.library.custom_op("leanmill::topk_router", mutates_args=())
def _route(
    logits: Tensor, bias: Tensor | None, token_mask: Tensor | None, scaling: float, numbers: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    settings = Settings.of(scaling, numbers)
    return _path(logits).topk_router(logits.contiguous(), bias, token_mask, settings)  # type: ignore[no-any-return]


@_route.register_fake
def _(
    logits: Tensor, bias: Tensor | None, token_mask: Tensor | None, scaling: float, numbers: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    settings = Settings.of(scaling, numbers)
    wide = torch.promote_types(logits.dtype, torch.float32)
    num_tokens, num_experts = logits.shape
    index = logits.new_empty(num_tokens, settings.top_k, dtype=torch.int64)
    weights = logits.new_empty(num_tokens, settings.top_k, dtype=wide)
    counts = logits.new_empty(settings.num_sequences, num_experts, dtype=torch.int64)
    means = logits.new_empty(settings.num_sequences, num_experts, dtype=wide)
    return weights, index, counts, logits.new_empty((), dtype=wide), means


@torch.library.custom_op("leanmill::topk_router_backward", mutates_args=())
def _route_backward(
    logits: Tensor,
    index: Tensor,
    token_mask: Tensor | None,
    grads: list[Tensor],
    scaling: float,
    numbers: list[int],
) -> Tensor:
    settings = Settings.of(scaling, numbers)
    operands = logits.contiguous(), index.contiguous(), token_mask, tuple(grads)
    return _path(logits).backward(*operands, settings)  # type: ignore[no-any-return]


@_route_backward.register_fake
def _(
    logits: Tensor,
    index: Tensor,
    token_mask: Tensor | None,
    grads: list[Tensor],
    scaling: float,
    numbers: list[int],
) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, token_mask, *ctx.options = inputs
    ctx.save_for_backward(logits, output[1], token_mask)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    logits, index, token_mask = ctx.saved_tensors
    grad_weights, _, _, grad_z, grad_mean = grads
    found = _route_backward(logits, index, token_mask, [grad_weights, grad_z, grad_mean], *ctx.options)
    return found, *(None,) * 4


_route.register_autograd(_backward, setup_context=_save)
