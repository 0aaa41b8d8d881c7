"""The fastest layout that fits, what came next, and why each lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import yaml

from leanmill.core.errors import ConfigError
from leanmill.parallel.config import FsdpEngine
from leanmill.plan.engines import label
from leanmill.plan.fit import Case
from leanmill.plan.layouts.candidates import SHARED, Candidate, Candidates, size_of
from leanmill.plan.layouts.rates import Rates
from leanmill.plan.layouts.step_time import MEANING, Point, StepTime, predict
from leanmill.plan.layouts.work import Work
from leanmill.plan.transient import activation_bytes
from leanmill.plan.weight import Memory
from leanmill.recipe.root import Recipe
from leanmill.trainer.prepare import with_precision


ACCURACY = 0.05
"""Predictions closer to each other than this are called equal."""
EQUAL = 0.01
"""Within this, the one that takes less memory is the better one."""


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """A layout with what is predicted of it."""

    candidate: Candidate
    time: StepTime
    memory: Memory | None
    """Of one rank; None where it was not looked at."""
    fits: bool
    reason: str = ""
    """Why it lost; empty of the best."""

    @property
    def peak_bytes(self) -> int:
        """Of one rank."""
        return 0 if self.memory is None else self.memory.peak

    @property
    def kind(self) -> tuple[str, ...]:
        """Engine without its sizes, and what ranks share."""
        layout = self.candidate.recipe.layout
        return (label(self.candidate.engine), *(key for key in SHARED if size_of(layout, key) > 1))

    @property
    def name(self) -> str:
        """Engine and layout in one line."""
        layout, engine = self.candidate.layout, self.candidate.engine
        name = label(engine)
        if isinstance(engine, FsdpEngine):
            name += "" if engine.reshard_after_forward else " kept gathered"
            name += f" {layout.dp_replicate} x {layout.dp_shard}" if layout.dp_replicate > 1 else f" {layout.dp_shard}"
        shared = {key: size_of(self.candidate.recipe.layout, key) for key in SHARED}
        split = ["tokens split"] if layout.sequence_parallel else []
        return ", ".join([name, *(f"{key} {size}" for key, size in shared.items() if size > 1), *split])

    def to_json(self, asked: Recipe) -> dict[str, Any]:
        """Return plain values; `asked` is the recipe as it was."""
        recipe = self.candidate.recipe
        return {
            "name": self.name,
            "settings": settings(self.candidate, asked),
            "step_seconds": self.time.seconds,
            "parts": dict(self.time.parts),
            "hidden_seconds": self.time.hidden_seconds,
            "bytes_between": self.time.bytes_between,
            "bytes_inside": self.time.bytes_inside,
            "tokens_per_second": recipe.batch.tokens_per_step / self.time.seconds,
            "num_micro_batches": self.candidate.num_micro_batches,
            "peak_bytes": self.peak_bytes,
            "fits": self.fits,
            "reason": self.reason,
        }


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search came to."""

    recipe: Recipe
    world_size: int
    per_node: int
    rates: Rates
    rank_memory_bytes: int
    ranked: list[Ranked]
    """The best first; of each engine and layout the best micro-batch and recomputation that fits. One that would be
    faster than the best but does not fit stands where its time puts it, after the best."""
    num_tried: int
    refused: Mapping[str, int]
    """Combinations that the package's own checks refuse, by reason."""

    @property
    def best(self) -> Ranked:
        """The fastest that fits."""
        return self.ranked[0]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "recipe": self.recipe.name,
            "world_size": self.world_size,
            "per_node": self.per_node,
            "rates": self.rates.name,
            "rank_memory_bytes": self.rank_memory_bytes,
            "num_tried": self.num_tried,
            "best_yaml": as_yaml(self.best.candidate, self.recipe),
            "ranked": [one.to_json(self.recipe) for one in self.ranked],
            "refused": dict(self.refused),
        }


def search(
    recipe: Recipe,
    world_size: int,
    per_node: int,
    *,
    rates: Rates,
    rank_memory_gib: float,
    nvme_path: str | None = None,
) -> Found:
    """Predict the step of every layout that the package accepts and return them in order.

    Args:
        recipe: Whose model, data, batch in tokens, optimizer and techniques stay; engine, layout, micro-batch and
            recomputation are searched.
        world_size: Ranks.
        per_node: Ranks of one machine.
        rates: Of a rank and its links.
        rank_memory_gib: Memory of a rank.
        nvme_path: Directory for offload to NVMe; None leaves it out.

    Raises:
        ConfigError: Nothing fits; the message names what comes closest.
    """
    if world_size % per_node:
        raise ConfigError(f"{world_size} ranks do not fill machines of {per_node}; give --nodes and --gpus-per-node")
    recipe = with_precision(recipe, "cpu" if recipe.device == "cpu" or not torch.cuda.is_available() else "cuda")
    available = int(rank_memory_gib * 2**30)
    candidates = Candidates(recipe=recipe, world_size=world_size, per_node=per_node, nvme_path=nvme_path)
    work: dict[int, Work] = {}
    timed = []
    for one in candidates:
        if id(one.subject) not in work:
            work[id(one.subject)] = Work.of(one.subject)
        timed.append((one, step_time(one, work[id(one.subject)], rates, per_node)))
    if not timed:
        reasons = "; ".join(candidates.refused) or "the batch does not divide over the ranks"
        raise ConfigError(f"no layout is possible on {world_size} ranks: {reasons}")
    timed.sort(key=lambda pair: pair[1].seconds)
    ranked = _order(timed, available)
    if not ranked[0].fits:
        least = min(ranked, key=lambda one: one.peak_bytes)
        raise ConfigError(
            f"nothing fits {rank_memory_gib:g} GiB a rank on {world_size} ranks; closest is {least.name} with "
            f"{least.peak_bytes / 2**30:.1f} GiB: take more ranks, or ranks with more memory"
        )
    return Found(
        recipe=recipe,
        world_size=world_size,
        per_node=per_node,
        rates=rates,
        rank_memory_bytes=available,
        ranked=[ranked[0], *(replace(one, reason=_reason(one, ranked[0], available)) for one in ranked[1:])],
        num_tried=len(timed),
        refused=dict(candidates.refused.most_common()),
    )


def step_time(one: Candidate, work: Work, rates: Rates, per_node: int) -> StepTime:
    """Predict the step of one run; see `predict`."""
    recipe = one.recipe
    tokens = recipe.batch.tokens_per_micro_batch
    own = recipe.batch.model_copy(update={"tokens_per_micro_batch": tokens // one.layout.cp})
    train = recipe.train.model_copy(update={"activation_checkpointing": "none"})
    whole = recipe.model_copy(update={"batch": own, "train": train})
    point = Point(
        engine=one.engine,
        layout=one.layout,
        pipeline=one.pipeline,
        tokens=tokens,
        num_micro_batches=one.num_micro_batches,
        recompute=recipe.train.activation_checkpointing,
        is_compiled=recipe.train.compile,
        kept_bytes=activation_bytes(whole, one.subject.config, one.subject.token_shares) / one.pipeline,
    )
    return predict(point, work, rates, per_node=per_node, precision=recipe.train.precision, optimizer=recipe.optimizer)


def _order(timed: Sequence[tuple[Candidate, StepTime]], available: int) -> list[Ranked]:
    """The fastest of each engine and layout that fits; where none does, the one that takes the least memory."""
    fitting: dict[tuple[Any, ...], Ranked] = {}
    too_large: dict[tuple[Any, ...], Ranked] = {}
    states: dict[tuple[Any, ...], Memory] = {}
    for one, time in timed:
        layout = one.recipe.layout
        key = (one.engine.model_dump_json(), layout.model_dump_json())
        if key in fitting:
            continue
        case = Case(recipe=one.recipe, engine=one.engine, world_size=one.layout.world_size)
        of_state = (*key, one.num_micro_batches > 1)
        if of_state not in states:
            states[of_state] = one.subject.state_memory(case, available)
        memory = states[of_state].copy()
        one.subject.add_micro_batch(memory, case)
        found = Ranked(candidate=one, time=time, memory=memory, fits=memory.peak <= available)
        if found.fits:
            fitting[key] = found
            too_large.pop(key, None)
        elif key not in too_large or memory.peak < too_large[key].peak_bytes:
            too_large[key] = found
    by_time = sorted([*fitting.values(), *too_large.values()], key=lambda found: found.time.seconds)
    fast = [found for found in by_time if found.fits]
    if not fast:
        return by_time
    # Of equals one without offload, and of those the one that takes the least memory.
    equal = (found for found in fast if found.time.seconds <= (1 + EQUAL) * fast[0].time.seconds)
    best = min(equal, key=lambda found: (bool(found.memory and found.memory.host), found.peak_bytes))
    return [best, *(found for found in by_time if found is not best)]


def _reason(one: Ranked, best: Ranked, available: int) -> str:
    if not one.fits:
        return f"memory: {one.peak_bytes / 2**30:.1f} of {available / 2**30:.0f} GiB a rank"
    excess = {part: one.time.parts.get(part, 0.0) - best.time.parts.get(part, 0.0) for part in MEANING}
    part = max(excess, key=lambda name: excess[name])
    slower = one.time.seconds / best.time.seconds - 1
    if slower < ACCURACY and excess[part] < ACCURACY * best.time.seconds:
        return f"as fast, within {ACCURACY:.0%}"
    sent = f", {one.time.bytes_between / 1e9:.1f} GB to other machines" if part == "links between" else ""
    more = excess[part]
    return f"{part}: +{f'{more:.3g} s' if more >= 1 else f'{1000 * more:.3g} ms'}{sent}"


def settings(candidate: Candidate, asked: Recipe) -> dict[str, Any]:
    """Return what a recipe must say to run so."""
    recipe = candidate.recipe
    layout = recipe.layout.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    if isinstance(recipe.engine, FsdpEngine) and candidate.layout.dp_replicate == 1:
        layout.pop("dp_shard", None)  # all ranks, which is the default
    engine = recipe.engine.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    return {
        "engine": {"type": recipe.engine.type, **engine},
        "layout": layout,
        "batch": {"tokens_per_micro_batch": recipe.batch.tokens_per_micro_batch},
        "train": {
            "activation_checkpointing": recipe.train.activation_checkpointing,
            **({} if recipe.train.compile == asked.train.compile else {"compile": recipe.train.compile}),
        },
    }


def as_yaml(candidate: Candidate, asked: Recipe) -> str:
    """Return what to paste into a recipe, `layout` too where it is all defaults, so that it replaces what was there."""
    return "".join(
        f"{key}: {yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)}"
        for key, value in settings(candidate, asked).items()
    )
