"""The layouts, engines, micro-batches and recomputation that a recipe could run with on so many ranks.

What is legal is asked of the package's own checks, so that nothing is suggested that a run would refuse.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from leanmill.core.errors import ConfigError
from leanmill.parallel.config import (
    DdpEngine,
    DeepSpeedEngine,
    DeepSpeedOffload,
    EngineConfig,
    FsdpEngine,
    LayoutConfig,
    SingleEngine,
)
from leanmill.parallel.layout import Layout, resolve_layout
from leanmill.plan.subject import Subject, plain_model
from leanmill.recipe.root import Recipe
from leanmill.recipe.rules import micro_batches_of_step, problems


SHARED = ("tp", "cp", "ep")
"""What ranks may share beside data, by the keys of `layout`. Not blocks (`pp`): memory is counted for ranks alike."""
RECOMPUTE = ("none", "selective", "full")
MAX_ROWS = 64
"""Rows of a micro-batch, at most."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A run that all checks accept."""

    recipe: Recipe
    layout: Layout
    subject: Subject
    num_micro_batches: int

    @property
    def engine(self) -> EngineConfig:
        """Its engine."""
        return self.recipe.engine

    @property
    def pipeline(self) -> int:
        """Stages of a pipeline."""
        return size_of(self.recipe.layout, "pp")


def size_of(layout: LayoutConfig, key: str) -> int:
    """Return how many ranks share something, 1 where `layout` has no such key."""
    size: int = getattr(layout, key, 1)
    return size


@dataclass(kw_only=True)
class Candidates:
    """All of them, and why others are none.

    Args:
        recipe: Whose model, data, batch and techniques stay as they are.
        world_size: Ranks.
        per_node: Ranks of one machine.
        nvme_path: A directory on NVMe that ZeRO-3 may keep the optimizer's state in; None offers none.
    """

    recipe: Recipe
    world_size: int
    per_node: int
    nvme_path: str | None = None
    refused: Counter[str] = field(default_factory=Counter)
    """How many combinations were refused, by the reason given."""

    def __post_init__(self) -> None:
        self._subjects: dict[tuple[int, ...], Subject | None] = {}
        whole = self.recipe.model_copy(update={"layout": self._alone})
        self._plain, self._whole = plain_model(self.recipe), Subject.of(whole, self.world_size)

    @property
    def _alone(self) -> LayoutConfig:
        """The recipe's layout with nothing shared but data; the rest is its own choice, and changes what it trains."""
        sizes: dict[str, Any] = dict.fromkeys(SHARED, 1)
        other = ("cp_attention", "cp_rows", "pp", "pp_schedule", "pp_split")
        of_others = {key: LayoutConfig.model_fields[key].default for key in other}
        of_data = {"dp_shard": None, "dp_replicate": None}
        changes = {**sizes, **of_data, **of_others, "expert_chunks": 1, "sequence_parallel": False}
        return self.recipe.layout.model_copy(update=changes)

    def __iter__(self) -> Iterator[Candidate]:
        for layout in self._layouts():
            subject = self._subject(layout)
            for engine in [] if subject is None else self._engines(layout):
                assert subject is not None
                yield from self._of(layout.model_copy(update=_sharding(engine)), engine, subject)

    def _layouts(self) -> Iterator[LayoutConfig]:
        divisors = [d for d in range(1, self.world_size + 1) if self.world_size % d == 0]
        sizes = {key: [d for d in divisors if d <= self.per_node or key == "ep"] for key in SHARED}
        plain = self._alone
        for chosen in product(*sizes.values()):
            shared = dict(zip(sizes, chosen, strict=True))
            size = 1
            for key, number in shared.items():
                size *= 1 if key == "ep" else number
            if self.world_size % size == 0:
                layout = plain.model_copy(update={**shared, **self._of_rows(shared), **_without_travel(plain, shared)})
                yield layout
                if shared.get("tp", 1) > 1:
                    yield layout.model_copy(update={"sequence_parallel": True})

    def _of_rows(self, shared: dict[str, int]) -> dict[str, Any]:
        """What the recipe says of rows that ranks share, where they do."""
        asked = self.recipe.layout
        return {"cp_attention": asked.cp_attention, "cp_rows": asked.cp_rows} if shared.get("cp", 1) > 1 else {}

    def _engines(self, layout: LayoutConfig) -> Iterator[EngineConfig]:
        if self.world_size <= layout.num_workers:
            yield self._asked(SingleEngine)
            return
        yield self._asked(DdpEngine)
        ranks = self.world_size // layout.num_workers // (layout.tp * size_of(layout, "pp"))
        for size in (d for d in range(2, ranks + 1) if ranks % d == 0):
            for frees, offloads in ((True, False), (False, False), (True, True)):
                yield self._asked(
                    FsdpEngine, shard_size=None, reshard_after_forward=frees, cpu_offload=offloads
                ).model_copy(update={"shard_size": size})
        host = DeepSpeedOffload(device="cpu")
        for stage in (1, 2, 3):
            yield DeepSpeedEngine(stage=stage)  # type: ignore[arg-type]
            yield DeepSpeedEngine(stage=stage, offload_optimizer=host)  # type: ignore[arg-type]
        yield DeepSpeedEngine(stage=3, offload_optimizer=host, offload_parameters=host)
        if self.nvme_path is not None:
            nvme = DeepSpeedOffload(device="nvme", path=self.nvme_path)
            yield DeepSpeedEngine(stage=3, offload_optimizer=nvme)

    def _asked(self, kind: type[Any], **changes: Any) -> Any:
        """An engine with what the recipe says of one of its type."""
        asked = self.recipe.engine
        options = asked.model_dump(exclude={"type"}) if asked.type == kind.model_fields["type"].default else {}
        return kind(**options | changes)

    def _subject(self, layout: LayoutConfig) -> Subject | None:
        """The model, where ranks can share it so."""
        key = (layout.tp, layout.num_expert_ranks(self.world_size))
        if key not in self._subjects:
            self._subjects[key] = None
            try:
                self._subjects[key] = self._whole.shared_by(self._plain, layout, self.world_size)
            except ConfigError as error:
                self.refused[str(error)] += 1
        return self._subjects[key]

    def _of(self, layout: LayoutConfig, engine: EngineConfig, subject: Subject) -> Iterator[Candidate]:
        typed = engine.model_copy(update={"shard_size": None}) if isinstance(engine, FsdpEngine) else engine
        changed = self._changed(layout, typed)
        try:
            found = list(problems(changed))
            if found and changed.train.compile:
                # What travels in the middle of a block does not compile; whether it is worth that, the times say.
                changed = _with(changed, "train", compile=False)
                found = list(problems(changed))
            if found:
                raise ConfigError(found[0])
            resolved = resolve_layout(layout, typed, self.world_size)
        except ConfigError as error:
            self.refused[str(error)] += 1
            return
        for rows in self._rows(layout):
            batched = _with(changed, "batch", tokens_per_micro_batch=rows * changed.data.sequence_length)
            for recompute in RECOMPUTE:
                recipe = _with(batched, "train", activation_checkpointing=recompute)
                if any(problems(recipe)):
                    continue
                number = micro_batches_of_step(recipe, layout.data_size(self.world_size))
                yield Candidate(recipe=recipe, layout=resolved, subject=subject, num_micro_batches=number)

    def _changed(self, layout: LayoutConfig, engine: EngineConfig) -> Recipe:
        return self.recipe.model_copy(update={"layout": layout, "engine": engine})

    def _rows(self, layout: LayoutConfig) -> list[int]:
        """Rows of a micro-batch with which the step comes out."""
        recipe = self.recipe
        rows, data_size = recipe.batch.tokens_per_step // recipe.data.sequence_length, layout.data_size(self.world_size)
        fitting = [n for n in range(1, MAX_ROWS + 1) if rows % (n * data_size) == 0]
        if not fitting:
            self.refused[f"{rows} rows of a step do not divide over {data_size} data ranks"] += 1
        return fitting


def _with(recipe: Recipe, section: str, **changes: Any) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=changes)})


def _sharding(engine: EngineConfig) -> dict[str, int | None]:
    return {"dp_shard": engine.shard_size if isinstance(engine, FsdpEngine) else None}


def _without_travel(layout: LayoutConfig, shared: dict[str, int]) -> dict[str, Any]:
    return {"expert_resend": False} if shared.get("ep", 1) == 1 and not layout.tokens_travel else {}
