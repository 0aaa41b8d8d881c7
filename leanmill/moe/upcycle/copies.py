"""From a mixture of experts to one with more of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from leanmill.core.errors import ConfigError, RunError
from leanmill.core.noise import derive_seed
from leanmill.core.passes import StoredBlock
from leanmill.core.stored_experts import PROJECTIONS, STORED_EXPERTS, StoredExperts


class MoreExperts:
    """Every expert m times, the copies' rows of the router with noise.

    A token that went through K experts now finds m rows for each. At K as before it goes through some m-th of them with
    their copies, unless noise decides otherwise: a start to train on, not the same function. At m K it goes
    through the same experts, m times each, and where the weights of chosen experts sum to 1 each copy has a m-th of the
    expert's weight, so that without noise the function stays.
    """

    def __init__(self, *, factor: int, top_k: int | None, router_noise: float, seed: int) -> None:
        self.factor, self.top_k, self.router_noise, self.seed = factor, top_k, router_noise, seed
        self.before: Any = None
        self.after: Any = None

    def config(self, before: Any) -> Any:
        if before.model_type not in STORED_EXPERTS:
            raise ConfigError(
                f"expert_upcycle: {before.model_type!r} is no mixture it knows; give one of {', '.join(STORED_EXPERTS)}"
            )
        self.before, self.after = before, copy.deepcopy(before)
        self.after.num_experts = before.num_experts * self.factor
        self.after.num_experts_per_tok = self.top_k or before.num_experts_per_tok
        if self.after.num_experts_per_tok > self.after.num_experts:
            raise ConfigError(
                f"expert_upcycle: top_k={self.top_k} of {self.after.num_experts} experts; type top_k of at most that"
            )
        return self.after

    def block(self, block: StoredBlock) -> Iterator[tuple[str, Tensor]]:
        names: StoredExperts = STORED_EXPERTS[self.before.model_type]
        num_experts = names.num_experts(block.names)
        if num_experts not in (0, self.before.num_experts):
            raise RunError(
                f"layer {block.index} holds {num_experts} experts, its config says {self.before.num_experts}"
            )
        for name in sorted(block.names):
            if num_experts and name == names.router:
                yield name, self._router(block.index, block.read(name))
            elif not names.is_of_experts(name):
                yield name, block.read(name)
        for expert in range(num_experts * self.factor):
            for part in PROJECTIONS:
                yield names.expert(expert, part), block.read(names.expert(expert % num_experts, part))

    def _router(self, layer: int, rows: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "expert_upcycle", layer))
        exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
        copies = exact.repeat(self.factor - 1, 1)
        noise = torch.randn(copies.shape, generator=generator).to(exact.dtype)
        return torch.cat([exact, copies + noise * exact.std() * self.router_noise]).to(rows.dtype)

    def describe(self) -> str:
        return (
            f"{self.before.num_experts} experts become {self.after.num_experts}, top "
            f"{self.after.num_experts_per_tok} (was {self.before.num_experts_per_tok})"
        )
