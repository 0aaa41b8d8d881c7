"""From a mixture of experts to one with more of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from leanmill.core.errors import ConfigError, RunError
from leanmill.core.noise import derive_seed
from leanmill.core.stored_experts import PROJECTIONS, STORED_EXPERTS, StoredExperts
from leanmill.core.surgery import ExpertGradients, GradientSurgeon, StoredBlock


Copies = Literal["equal", "gradient", "saliency"]


class MoreExperts(GradientSurgeon):
    """m times as many experts, the copies' rows of the router with noise.

    Where every expert is copied as often, a token that went through K experts now finds m rows for each. At K as before
    it goes through some m-th of them with their copies, unless noise decides otherwise: a start to train on, not the
    same function. At m K it goes through the same experts, m times each, and where the weights of chosen experts sum to
    1 each copy has a m-th of the expert's weight, so that without noise the function stays.

    Args:
        factor: m.
        copies: See `ExpertUpcycle`, as for the rest.
        most_copies: Of one expert.
        top_k: Of the new model.
        router_noise: On the copies' rows.
        seed: Of the noise.
    """

    def __init__(
        self,
        *,
        factor: int,
        copies: Copies,
        most_copies: int,
        top_k: int | None,
        router_noise: float,
        seed: int,
    ) -> None:
        self.factor, self.copies, self.most_copies = factor, copies, most_copies
        self.top_k, self.router_noise, self.seed = top_k, router_noise, seed
        self.before: Any = None
        self.after: Any = None
        self.origins: dict[int, list[int]] = {}
        """By layer: which expert each new one was; only of layers that gradients were seen of."""

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

    def see(self, gradients: Mapping[int, ExpertGradients]) -> None:
        num_new = (self.factor - 1) * self.before.num_experts
        for layer, found in gradients.items():
            scores = found.squared_gradient
            if self.copies == "saliency":
                scores = (found.squared_gradient * found.squared_weight).sqrt()
            self.origins[layer] = [*range(len(scores)), *most_useful(scores, num_new, self.most_copies)]

    def block(self, block: StoredBlock) -> Iterator[tuple[str, Tensor]]:
        names: StoredExperts = STORED_EXPERTS[self.before.model_type]
        num_experts = names.num_experts(block.names)
        if num_experts not in (0, self.before.num_experts):
            raise RunError(
                f"layer {block.index} holds {num_experts} experts, its config says {self.before.num_experts}"
            )
        for name in sorted(block.names):
            if num_experts and name == names.router:
                yield name, self._router(block.index, block.read(name), num_experts)
            elif not names.is_of_experts(name):
                yield name, block.read(name)
        for expert, origin in enumerate(self._origins(block.index, num_experts)):
            for part in PROJECTIONS:
                yield names.expert(expert, part), block.read(names.expert(origin, part))

    def _origins(self, layer: int, num_experts: int) -> list[int]:
        return self.origins.get(layer) or [*range(num_experts)] * self.factor

    def _router(self, layer: int, rows: Tensor, num_experts: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "expert_upcycle", layer))
        exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
        copies = exact[self._origins(layer, num_experts)[num_experts:]]
        noise = torch.randn(copies.shape, generator=generator).to(exact.dtype)
        return torch.cat([exact, copies + noise * exact.std() * self.router_noise]).to(rows.dtype)

    def describe(self) -> str:
        text = (
            f"{self.before.num_experts} experts become {self.after.num_experts}, top "
            f"{self.after.num_experts_per_tok} (was {self.before.num_experts_per_tok})"
        )
        if not self.origins:
            return text
        layers = [
            f"{layer}: {' '.join(str(origins.count(expert)) for expert in range(self.before.num_experts))}"
            for layer, origins in sorted(self.origins.items())
        ]
        return f"{text}; of each expert by layer, {'; '.join(layers)}"


def most_useful(scores: Tensor, num_new: int, most_copies: int) -> list[int]:
    """Return which expert each new one copies: the best `most_copies` times, then the next, as in the authors' code.

    Args:
        scores: [E]; of equal ones the first comes first.
        num_new: At most E x most_copies.
        most_copies: Of one expert.
    """
    order = scores.sort(descending=True, stable=True).indices
    return order.repeat_interleave(most_copies)[:num_new].tolist()  # type: ignore[no-any-return]
