"""An experts module on one rank and spread over ranks: the same tokens, outputs and gradients of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from leanmill.core.experts import set_dispatch, stacked_parameters, use_our_compute
from leanmill.parallel.dispatch import AllToAllDispatch


NUM_EXPERTS, TOP_K, HIDDEN, WIDTH = 8, 3, 16, 12


def experts_module(dtype: torch.dtype = torch.float64) -> nn.Module:
    """All experts, the same on every call."""
    config = Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=WIDTH, num_experts=NUM_EXPERTS)
    module = Qwen3MoeExperts(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    use_our_compute(module, "experts", remedy="cannot be tested")
    return module.to(dtype)


def keep_own_experts(module: nn.Module, rank: int, num_ranks: int) -> None:
    """Leave a rank its own experts' weights."""
    for name in stacked_parameters(module):
        own = getattr(module, name).detach().chunk(num_ranks)[rank].clone()
        setattr(module, name, nn.Parameter(own))


def spread_module(dtype: torch.dtype = torch.float64, *, num_chunks: int = 1) -> nn.Module:
    """This rank's experts, with a dispatch over all ranks."""
    module = experts_module(dtype)
    keep_own_experts(module, dist.get_rank(), dist.get_world_size())
    set_dispatch(module, AllToAllDispatch(dist.group.WORLD, NUM_EXPERTS, num_chunks=num_chunks), "experts")
    return module


@dataclass
class Inputs:
    """What one rank's router hands to its experts, and the gradient of what they return."""

    tokens: Tensor
    index: Tensor
    weights: Tensor
    upstream: Tensor

    def run(self, module: nn.Module) -> dict[str, Tensor | None]:
        """Outputs and all gradients."""
        return self.run_with(module, module)

    def run_with(self, function: Callable[..., Tensor], module: nn.Module) -> dict[str, Tensor | None]:
        """Likewise, where `function` calls `module`."""
        tokens, weights = (t.clone().requires_grad_() for t in (self.tokens, self.weights))
        module.zero_grad()
        out = function(tokens, self.index, weights)
        out.backward(self.upstream)
        grads = {"tokens": tokens.grad, "combine weights": weights.grad}
        return {"out": out.detach(), **grads} | {name: p.grad for name, p in module.named_parameters()}


class Collectives(TorchDispatchMode):
    """Notes what is sent: (operator, tensor, rows to each rank)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, Tensor, list[int] | None]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().partition("::")[2].partition(".")[0]
        if function.namespace == "_c10d_functional" and name != "wait_tensor":
            self.found.append((name, args[0], args[2] if name == "all_to_all_single" else None))
        return function(*args, **(kwargs or {}))

    def bytes_sent(self, rank: int) -> int:
        """To other ranks, in all-to-alls."""
        total = 0
        for _, tensor, rows in self.found:
            if rows is not None:
                total += (sum(rows) - rows[rank]) * tensor[0].numel() * tensor.element_size()
        return total

    def names(self) -> list[str]:
        """Operators in the order they were called."""
        return [name for name, *_ in self.found]


def inputs(
    num_tokens: list[int], dtype: torch.dtype = torch.float64, *, seed: int = 1, drop: float = 0.15
) -> list[Inputs]:
    """Inputs of each rank; a share `drop` of copies is dropped."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    found = []
    for count in num_tokens:
        index = torch.rand(count, NUM_EXPERTS, generator=generator).topk(TOP_K).indices
        index[torch.rand(index.shape, generator=generator) < drop] = NUM_EXPERTS
        weights = drawn(count, TOP_K).abs().masked_fill(index == NUM_EXPERTS, 0.0)
        found.append(Inputs(drawn(count, HIDDEN), index, weights, drawn(count, HIDDEN)))
    return found


def together(ranks: list[Inputs]) -> Inputs:
    """All ranks' inputs on one."""
    fields = ("tokens", "index", "weights", "upstream")
    return Inputs(*(torch.cat([getattr(one, field) for one in ranks]) for field in fields))


def compare(found: list[dict[str, Tensor | None]], expected: dict[str, Tensor | None], bound: float) -> None:
    """Hold what ranks found, put together, against what one found."""
    for name, other in expected.items():
        assert other is not None
        assert all(one[name] is not None for one in found), f"{name} has no gradient on some rank"
        got = torch.cat([one[name] for one in found])  # type: ignore[misc]
        error = (got - other).abs().max() / max(1.0, other.abs().max().item())
        assert error <= bound, f"{name}: {error:.2e}"
