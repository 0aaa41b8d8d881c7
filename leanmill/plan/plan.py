"""What a run will need, predicted from shapes: parameters, memory of a rank by part, tokens and FLOPs.

The model is built on the meta device with its techniques installed, so nothing is allocated and no
device is touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from leanmill.core.errors import ConfigError
from leanmill.models.config import ModelConfig
from leanmill.plan.engines import candidates, engine_of, label
from leanmill.plan.fit import Case, remedies
from leanmill.plan.subject import Subject
from leanmill.plan.weight import Memory
from leanmill.recipe.root import Recipe
from leanmill.recipe.rules import known_steps, micro_batches_of_step
from leanmill.trainer.prepare import with_precision


DEFAULT_RANK_MEMORY_GIB = 80.0
"""Memory of one rank that `engine: auto` is decided with, unless told."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Predictions for one recipe on `world_size` ranks. Plain numbers; bytes are of one rank."""

    recipe: str
    world_size: int
    num_nodes: int
    engine: str
    why_engine: str
    num_parameters: int
    """Of the plain model, tied weights once."""
    num_active: int
    """Parameters one token passes through: of experts, only the chosen ones."""
    mixture: tuple[str, ...]
    """What `model.moe` came to, in words; empty without it."""
    num_trainable: int
    """With techniques installed; where parameters take turns, the most that train at once."""
    num_technique: int
    """Elements that techniques add: adapters, learned scales, masks."""
    memory: Memory
    rank_memory_bytes: int
    """What a rank was taken to have."""
    remedies: dict[str, int]
    """Where a rank has too little: what to type, and the peak after it; see `leanmill.plan.fit`."""
    alternatives: dict[str, Memory]
    """The same run under every other engine that fits `world_size`."""
    checkpoint_bytes: int
    """Of one checkpoint, all ranks together."""
    tokens_per_step: int
    num_micro_batches: int
    num_steps: int | None
    """None where the recipe gives epochs, which only its data turns into steps; so with what follows from it."""
    total_tokens: int | None
    flops_per_token: float
    flops_per_step: float
    total_flops: float | None

    @property
    def held_bytes(self) -> int:
        """Model, gradients, optimizer state and lasting buffers on the device, at the end of a backward."""
        return sum(self.memory.held.values())

    @property
    def peak_bytes(self) -> int:
        """Everything on the device at once: held and transient parts."""
        return self.memory.peak

    @property
    def fits(self) -> bool:
        """Whether the peak is at most what a rank was taken to have."""
        return self.peak_bytes <= self.rank_memory_bytes

    @property
    def host_bytes(self) -> int:
        """Offloaded to host memory or NVMe."""
        return sum(self.memory.host.values())

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-able values, totals included."""
        totals = {"held_bytes": self.held_bytes, "peak_bytes": self.peak_bytes, "host_bytes": self.host_bytes}
        totals["fits"] = self.fits
        return {**asdict(self), **totals}


def plan(
    recipe: Recipe,
    world_size: int = 1,
    gpus_per_node: int | None = None,
    *,
    rank_memory_gib: float = DEFAULT_RANK_MEMORY_GIB,
    to_come: Mapping[str, ModelConfig] | None = None,
) -> Plan:
    """Predict a run.

    Args:
        recipe: The validated recipe.
        world_size: Ranks of the run.
        gpus_per_node: Ranks of one machine; None puts all on one.
        rank_memory_gib: Memory of a rank, GiB: what `engine: auto` decides by and the peak is held against.
        to_come: Models that earlier phases will leave, by folder; see `leanmill.phases.models.models_to_come`.

    Raises:
        ConfigError: The recipe cannot run on these ranks.
    """
    recipe = with_precision(recipe, "cpu" if recipe.device == "cpu" or not torch.cuda.is_available() else "cuda")
    per_node = gpus_per_node or world_size
    if world_size % per_node:
        raise ConfigError(f"{world_size} ranks do not fill machines of {per_node}; give --nodes and --gpus-per-node")
    num_micro_batches = micro_batches_of_step(recipe, recipe.layout.data_size(world_size))
    num_steps = known_steps(recipe)
    subject, available = Subject.of(recipe, world_size, to_come), int(rank_memory_gib * 2**30)
    engine, why = engine_of(recipe, world_size, per_node, 4 * subject.num_held, rank_memory_gib)
    asked = Case(recipe=recipe, engine=engine, world_size=world_size)

    def memory_of(case: Case) -> Memory:
        return subject.memory(case, available)

    memory = memory_of(asked)
    tried = [] if memory.peak <= available else remedies(asked, lambda case: memory_of(case).peak, available)
    tokens_per_step, flops = recipe.batch.tokens_per_step, subject.flops_per_token
    return Plan(
        recipe=recipe.name,
        world_size=world_size,
        num_nodes=world_size // per_node,
        engine=label(engine),
        why_engine=why,
        num_parameters=subject.num_parameters,
        num_active=subject.num_active,
        mixture=() if recipe.model.mixture is None else tuple(recipe.model.mixture.lines()),
        num_trainable=sum(w.numel for w in subject.weights if w.trainable),
        num_technique=sum(w.numel for w in subject.weights) - subject.num_parameters,
        memory=memory,
        rank_memory_bytes=available,
        remedies=dict(tried),
        alternatives={
            label(other): memory_of(replace(asked, engine=other)) for other in candidates(world_size, recipe.layout)
        },
        checkpoint_bytes=subject.checkpoint_bytes(recipe),
        tokens_per_step=tokens_per_step,
        num_micro_batches=num_micro_batches,
        num_steps=num_steps,
        total_tokens=None if num_steps is None else num_steps * tokens_per_step,
        flops_per_token=flops,
        flops_per_step=flops * tokens_per_step,
        total_flops=None if num_steps is None else flops * tokens_per_step * num_steps,
    )
