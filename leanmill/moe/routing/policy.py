"""What a router computes, found out by calling a small copy of it."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.errors import ConfigError
from leanmill.core.stage import AROUND
from leanmill.kernels.topk_router import naive
from leanmill.kernels.topk_router.op import Groups
from leanmill.kernels.topk_router.settings import Settings


Score = Literal["softmax", "sigmoid"]
"""How logits become scores; sigmoid ones are normalised over experts to be shares (arXiv:2412.19437, eq. 18)."""
ARGUMENT = "(argument)"
"""Stands for a path where the block around a router holds its bias and calls it with that."""
_NUM_TOKENS = 256
_FEW = 16
"""Tokens that tell most wrong policies already."""


@dataclass(frozen=True)
class Policy:
    """What a router makes of its logits."""

    num_experts: int
    top_k: int
    score: Score
    normalise: bool = True
    """Whether a token's combine weights sum to `scaling`. Softmax over the chosen logits alone is the same as
    the normalised softmax over all."""
    scaling: float = 1.0
    groups: Groups | None = None
    bias: str | None = None
    """What is added to scores for the choice only: the path below the module of a tensor with a number an expert that
    no gradient trains, or `ARGUMENT`, where the router is called with it."""
    is_exact: bool = True
    """Whether this is all that the router computes, and its logits are its `weight` x the hidden state, plus its
    `bias` where it has one; else only the number of experts, top_k and score are known."""

    def bias_of(self, router: nn.Module, given: Sequence[Tensor]) -> Tensor | None:
        """Return `bias` itself [num_experts].

        Args:
            router: Whose policy it is.
            given: What it is called with beside the hidden state.
        """
        if self.bias is None:
            return None
        found: Any = given[0] if self.bias == ARGUMENT else functools.reduce(getattr, self.bias.split("."), router)
        return found.reshape(-1)  # type: ignore[no-any-return]


def affinities(logits: Tensor, score: Score) -> Tensor:
    """Return each token's share of affinity to each expert, fp32, from logits [T, E]."""
    wide = logits.float()
    # The share of a sigmoid is the softmax of its logarithm, which does not underflow.
    return (F.logsigmoid(wide) if score == "sigmoid" else wide).softmax(-1)


def is_routing(output: Any) -> bool:
    """Whether a router's output is (logits [T, E], combine weights [T, K], experts [T, K] int64), maybe with more."""
    if not isinstance(output, tuple) or len(output) < 3 or not all(isinstance(part, Tensor) for part in output[:3]):
        return False
    logits, weights, experts = output[:3]
    is_float = logits.is_floating_point() and weights.is_floating_point() and not experts.is_floating_point()
    return is_float and logits.dim() == 2 and weights.shape == experts.shape and len(weights) == len(logits)


@torch.no_grad()
def policy_of(router: nn.Module, name: str, hidden_size: int) -> Policy:
    """Return how a router decides, from what a copy with random weights returns.

    Args:
        router: On any device, meta too; it stays as it is, and what stands around it is not asked.
        name: For the message.
        hidden_size: Width of what it takes.

    Raises:
        ConfigError: Its output has another form, or its scores come from neither softmax nor sigmoid.
    """
    twin, hidden = _twin(router, hidden_size)
    given = _further(twin)
    try:
        output = type(twin).forward(twin, hidden, *given)
    except (RuntimeError, TypeError, ValueError, IndexError):
        output = None
    found = _read(twin, hidden, given, *output[:3]) if is_routing(output) else None
    if found is None:
        raise ConfigError(
            f"the router {name} returns something else than (logits, combine weights, experts) with softmax or sigmoid "
            f"scores, as mixtral, qwen3_moe, olmoe, deepseek_v2, deepseek_v3 and gpt_oss do: choose such a model"
        )
    return found


def _twin(router: nn.Module, hidden_size: int) -> tuple[nn.Module, Tensor]:
    """A copy in fp32 on the CPU with random weights and correction biases, and tokens for it."""
    generator = torch.Generator().manual_seed(0)
    plain = copy.copy(router)
    plain._modules = {name: child for name, child in router._modules.items() if name != AROUND}
    plain.__dict__.pop("forward", None)
    twin = copy.deepcopy(plain).to_empty(device="cpu").float()
    for parameter in twin.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / hidden_size**0.5)
    for buffer in twin.buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.randn(buffer.shape, generator=generator) / 10)
        else:
            buffer.zero_()
    return twin, torch.randn(_NUM_TOKENS, hidden_size, generator=generator)


def _further(twin: nn.Module) -> list[Tensor]:
    """What a router must be called with beside the hidden state: nothing, or a bias."""
    parameters = list(inspect.signature(type(twin).forward).parameters.values())[2:]
    wanted = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    weight = getattr(twin, "weight", None)
    if len(wanted) != 1 or not isinstance(weight, Tensor):
        return []
    return [torch.randn(len(weight), generator=torch.Generator().manual_seed(1)) / 10]


def _read(
    router: nn.Module, hidden: Tensor, given: Sequence[Tensor], logits: Tensor, weights: Tensor, experts: Tensor
) -> Policy | None:
    score = _score(logits, weights, experts)
    if score is None:
        return None
    policy = Policy(logits.shape[1], experts.shape[1], score, is_exact=False)
    if not _is_linear(router, hidden, logits):
        return policy
    biases = [*_biases(router, policy.num_experts), *[ARGUMENT] * len(given)]
    for candidate in _candidates(policy, biases, logits, weights, experts):
        bias = candidate.bias_of(router, given)
        if all(_decides_so(candidate, bias, logits[:n], weights[:n], experts[:n]) for n in (_FEW, _NUM_TOKENS)):
            return candidate
    return policy


def _score(logits: Tensor, weights: Tensor, experts: Tensor) -> Score | None:
    """Which function the combine weights are proportional to, within every token."""
    candidates: tuple[Score, ...] = ("softmax", "sigmoid")
    for score in candidates:
        ratio = weights / affinities(logits, score).gather(1, experts)
        # Of one expert a token, only weights that are not normalised tell; all ones may be either.
        reference = ratio[:, :1] if ratio.shape[1] > 1 else ratio[:1]
        if torch.allclose(ratio, reference.expand_as(ratio), rtol=1e-3):
            return score
    # Sigmoids that are not normalised are proportional to shares within a token, so one a token comes last.
    if experts.shape[1] > 1:
        return None
    raw = weights / logits.float().sigmoid().gather(1, experts)
    if torch.allclose(raw, raw[:1].expand_as(raw), rtol=1e-3):
        return "sigmoid"
    return "softmax" if torch.allclose(weights, weights[:1].expand_as(weights)) else None


def _is_linear(router: nn.Module, hidden: Tensor, logits: Tensor) -> bool:
    """Whether the logits are those of a linear layer whose parameters are the only ones of the router that train."""
    own = dict(router.named_parameters())
    weight, bias = own.pop("weight", None), own.pop("bias", None)
    shape = (logits.shape[1], hidden.shape[1])
    if weight is None or weight.shape != shape or own.keys() - set(_biases(router, shape[0])):
        return False
    return torch.allclose(F.linear(hidden, weight, bias), logits, rtol=1e-4, atol=1e-5)


def _candidates(
    policy: Policy, biases: Sequence[str], logits: Tensor, weights: Tensor, experts: Tensor
) -> Iterator[Policy]:
    """Yield what the router may compute, what is simple first."""
    scores = logits.sigmoid() if policy.score == "sigmoid" else logits.softmax(-1)
    chosen, total = scores.gather(1, experts), weights.sum(-1)
    for normalise, scaling in ((True, total), (False, total / chosen.sum(-1))):
        if not torch.allclose(scaling, scaling[0].expand_as(scaling), rtol=1e-4):
            continue
        told = replace(policy, normalise=normalise, scaling=_rounded(float(scaling.mean())), is_exact=True)
        for bias in (None, *biases):
            for groups in (None, *_groups(policy, experts)):
                yield replace(told, bias=bias, groups=groups)


def _biases(router: nn.Module, num_experts: int) -> list[str]:
    """Paths of what may be added to scores: tensors with a number an expert that no gradient trains."""
    frozen = [(path, parameter) for path, parameter in router.named_parameters() if not parameter.requires_grad]
    return [
        path
        for path, tensor in (*router.named_buffers(), *frozen)
        if tensor.is_floating_point() and tensor.shape in ((num_experts,), (1, num_experts))
    ]


def _rounded(number: float) -> float:
    """The decimal that someone wrote, where one is near enough."""
    short = float(f"{number:.4g}")
    return short if abs(short - number) < 1e-5 * abs(number) else number


def _groups(policy: Policy, experts: Tensor) -> Iterator[Groups]:
    """Yield groups that no token's experts are from too many of."""
    for num_groups in range(2, policy.num_experts + 1):
        size, rest = divmod(policy.num_experts, num_groups)
        if rest:
            continue
        touched = F.one_hot(experts // size, num_groups).amax(1).sum(-1).max()
        for open_groups in range(int(touched), num_groups):
            if open_groups * size >= policy.top_k:
                yield from (Groups(num_groups, open_groups, best) for best in (1, 2) if best <= size)


def _decides_so(policy: Policy, bias: Tensor | None, logits: Tensor, weights: Tensor, experts: Tensor) -> bool:
    """Whether a policy gives these experts, in whatever order, and their weights."""
    groups = policy.groups or Groups(1, 1)
    settings = Settings(policy.top_k, policy.score == "sigmoid", policy.normalise, policy.scaling, *groups)
    ours, index, *_ = naive.topk_router(logits, bias, None, settings)
    ours_dense = torch.zeros_like(logits).scatter_(1, index, ours)
    return torch.allclose(ours_dense, torch.zeros_like(logits).scatter_(1, experts, weights), rtol=1e-4, atol=1e-6)
