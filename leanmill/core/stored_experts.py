"""How checkpoints name the experts of a block: one by one, while the modules hold them stacked. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal


Projection = Literal["gate", "up", "down"]
PROJECTIONS: tuple[Projection, ...] = ("gate", "up", "down")


@dataclass(frozen=True, kw_only=True)
class StoredExperts:
    """Names of the tensors of one sparse MLP, relative to its decoder block."""

    module: str
    """The MLP as the folder calls it."""
    gate: str
    up: str
    down: str

    def expert(self, index: int, projection: Projection) -> str:
        """Name of one weight of one expert: gate and up are [I, H], down is [H, I]."""
        return f"{self.module}.experts.{index}.{getattr(self, projection)}.weight"

    @property
    def router(self) -> str:
        """Name of the router's weight [num_experts, H]."""
        return f"{self.module}.gate.weight"

    def num_experts(self, names: Collection[str]) -> int:
        """Return how many experts the named tensors of a block hold; 0 where its MLP is dense."""
        pattern = re.compile(rf"{re.escape(self.module)}\.experts\.(\d+)\.{re.escape(self.down)}\.weight")
        return sum(pattern.fullmatch(name) is not None for name in names)

    def is_of_experts(self, name: str) -> bool:
        """Whether a tensor is a weight of an expert."""
        return name.startswith(f"{self.module}.experts.")


QWEN = StoredExperts(module="mlp", gate="gate_proj", up="up_proj", down="down_proj")
MIXTRAL = StoredExperts(module="block_sparse_moe", gate="w1", up="w3", down="w2")
STORED_EXPERTS: dict[str, StoredExperts] = {
    "mixtral": MIXTRAL,
    "qwen2_moe": QWEN,
    "qwen3_moe": QWEN,
    "olmoe": QWEN,
    "flex_olmo": QWEN,
}
"""By `model_type`: families whose router is a plain softmax with the same names in folder and module."""
