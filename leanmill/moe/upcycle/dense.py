"""From a dense model to a mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from leanmill.core.errors import ConfigError
from leanmill.core.noise import derive_seed
from leanmill.core.stored_experts import PROJECTIONS, STORED_EXPERTS
from leanmill.core.surgery import StoredBlock, Surgeon
from leanmill.moe.upcycle.families import Sizes, mixture_of


@dataclass(frozen=True, kw_only=True)
class Redrawn:
    """What of each expert is drawn anew."""

    share: float
    what: Literal["neurons", "weights"]
    std: float

    def apply(self, weights: dict[str, Tensor], generator: torch.Generator) -> None:
        """Redraw a share of an expert's weights in place: `gate` and `up` [I, H], `down` [H, I], float."""
        if self.share == 0:
            return
        num_neurons = weights["gate"].shape[0]
        order = torch.randperm(num_neurons, generator=generator)
        chosen = order[: round(self.share * num_neurons)]
        for name, weight in weights.items():
            by_neuron = weight.t() if name == "down" else weight
            if self.what == "weights":
                mask = torch.rand(by_neuron.shape, generator=generator) < self.share
                drawn = torch.randn(by_neuron.shape, generator=generator) * self.std
                by_neuron.copy_(torch.where(mask, drawn.to(by_neuron.dtype), by_neuron))
            elif len(chosen):
                old = by_neuron[chosen]
                drawn = torch.randn(old.shape, generator=generator).to(old.dtype)
                by_neuron[chosen] = drawn * old.std() + old.mean()


class DenseToExperts(Surgeon):
    """Copies, or shards of copies, of each MLP as experts, and a router that begins at random.

    With G shards of an MLP f and router rows that repeat in groups of G, a token's top-k are k / G whole copies. Each
    shard of copy c has weight p_c, so that the layer's output is f x sum_c p_c x the scale on `down_proj`. Where the
    chosen weights sum to 1 the sum over copies is 1 / G, and scale G gives f exactly. Where they are a part of a
    softmax over N experts it is near k / (G N), and the scale is G N / k.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        top_k: int,
        granularity: int,
        normalised: bool,
        router_std: float,
        first_dense_layers: int,
        moe_every: int,
        shared_size: int | None,
        redrawn: Redrawn,
        seed: int,
    ) -> None:
        self.num_experts, self.top_k, self.granularity, self.normalised = num_experts, top_k, granularity, normalised
        self.first_dense_layers, self.moe_every, self.shared_size = first_dense_layers, moe_every, shared_size
        self.router_std, self.redrawn, self.seed = router_std, redrawn, seed
        self.sizes: Sizes | None = None
        self.after: Any = None

    @property
    def scale(self) -> float:
        """Of `down_proj`."""
        return float(self.granularity if self.normalised else self.granularity * self.num_experts / self.top_k)

    def config(self, before: Any) -> Any:
        size, shared = before.intermediate_size, self.shared_size or 0
        if (size - shared) <= 0 or (size - shared) % self.granularity:
            kept = f"{size} - {shared}" if shared else f"{size}"
            raise ConfigError(
                f"upcycle: the MLP has {kept} neurons for experts, and granularity={self.granularity} does not divide "
                f"them; choose another granularity{' or shared_intermediate_size' if shared else ''}"
            )
        self.sizes = Sizes(
            num_experts=self.num_experts,
            top_k=self.top_k,
            normalised=self.normalised,
            expert_size=(size - shared) // self.granularity,
            shared_size=self.shared_size,
            first_dense_layers=self.first_dense_layers,
            moe_every=self.moe_every,
        )
        if all(self.sizes.is_dense(layer) for layer in range(before.num_hidden_layers)):
            raise ConfigError(
                f"upcycle: first_dense_layers={self.first_dense_layers} and moe_every={self.moe_every} leave none of "
                f"the {before.num_hidden_layers} layers for experts; lower them"
            )
        self.after = mixture_of(before, self.sizes)
        return self.after

    def block(self, block: StoredBlock) -> Iterator[tuple[str, Tensor]]:
        assert self.sizes is not None
        is_dense = self.sizes.is_dense(block.index)
        dense = {part: f"mlp.{part}_proj.weight" for part in PROJECTIONS}
        for name in sorted(block.names):
            if is_dense or name not in dense.values():
                yield name, block.read(name)
        if not is_dense:
            yield from self._sparse(block, {part: block.read(name) for part, name in dense.items()})

    def _sparse(self, block: StoredBlock, dense: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        assert self.sizes is not None
        names, size, shared = STORED_EXPERTS[self.after.model_type], self.sizes.expert_size, self.shared_size or 0
        for expert in range(self.num_experts):
            first = shared + (expert % self.granularity) * size
            weights = _neurons(dense, first, first + size)
            self.redrawn.apply(weights, self._generator(block.index, expert))
            weights["down"] = scaled(weights["down"], self.scale)
            for part in PROJECTIONS:
                yield names.expert(expert, part), weights[part]
        if shared:
            weights = _neurons(dense, 0, shared)
            # Its gate begins at sigmoid(0).
            weights["down"] = scaled(weights["down"], 2.0)
            for part in PROJECTIONS:
                yield f"{names.module}.shared_expert.{part}_proj.weight", weights[part]
            yield f"{names.module}.shared_expert_gate.weight", torch.zeros_like(dense["gate"][:1])
        yield names.router, self._router(block.index, dense["gate"])

    def _router(self, layer: int, like: Tensor) -> Tensor:
        num_copies, generator = self.num_experts // self.granularity, self._generator(layer, "router")
        rows = torch.randn(num_copies, like.shape[1], generator=generator) * self.router_std
        return rows.repeat_interleave(self.granularity, dim=0).to(like.dtype)

    def _generator(self, layer: int, what: int | str) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.seed, "upcycle", layer, what))

    def describe(self) -> str:
        assert self.sizes is not None
        size = self.sizes.expert_size
        made = f"{self.after.model_type} with {self.num_experts} experts of {size} neurons, top {self.top_k}"
        if self.redrawn.share:
            return f"{made}; {self.redrawn.share:.0%} of each expert is drawn anew, so it computes something else"
        if self.normalised:
            return f"{made}; it computes what the dense model did"
        return f"{made}; it computes what the dense model did while its router's probabilities are equal"


def scaled(weight: Tensor, factor: float) -> Tensor:
    """Return a weight times a number, in its own dtype; exact for powers of two."""
    return (weight.to(torch.promote_types(weight.dtype, torch.float32)) * factor).to(weight.dtype)


def _neurons(dense: dict[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    """Copies of the weights of some neurons of an MLP."""
    return {
        "gate": dense["gate"][first:last].clone(),
        "up": dense["up"][first:last].clone(),
        "down": dense["down"][:, first:last].clone(memory_format=torch.contiguous_format),
    }
