"""Whether a rank's memory is enough, and what to type where it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from leanmill.core.errors import ConfigError
from leanmill.parallel.config import EngineConfig, FsdpEngine
from leanmill.recipe.root import Recipe
from leanmill.recipe.rules import problems


MAX_RANKS_FACTOR = 64
"""More ranks are tried up to so many times the asked ones."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run whose memory can be asked for, and what turns the asked one into it."""

    recipe: Recipe
    engine: EngineConfig
    world_size: int
    typed: tuple[str, ...] = ()
    """What to type, in the order it was changed."""

    def __str__(self) -> str:
        return " ".join(self.typed)


def remedies(case: Case, peak_bytes: Callable[[Case], int], memory_bytes: int) -> list[tuple[str, int]]:
    """Return (what to type, peak bytes of a rank) of changes after which a rank has enough memory.

    Each single change that is enough on its own; where none is, the fewest together, taken in the order of
    what they cost; where all are not enough, all of them, with a peak above `memory_bytes`.

    Args:
        case: The run as asked, which needs too much.
        peak_bytes: Memory of one rank; a ConfigError says that a run is impossible.
        memory_bytes: What a rank has.
    """
    alone = [found for step in _STEPS if (found := _best(step(case), peak_bytes, memory_bytes))]
    enough = [(str(changed), peak) for changed, peak in alone if peak <= memory_bytes]
    if enough:
        return enough
    together: tuple[Case, int] | None = None
    for step in _STEPS:
        found = _best(step(together[0] if together else case), peak_bytes, memory_bytes)
        if found and (together is None or found[1] < together[1]):
            together = found
            if found[1] <= memory_bytes:
                break
    return [(str(together[0]), together[1])] if together else []


def _best(cases: Iterator[Case], peak_bytes: Callable[[Case], int], memory_bytes: int) -> tuple[Case, int] | None:
    """Return the first case that is enough, or the last legal one."""
    best = None
    for case in cases:
        try:
            if any(problems(case.recipe)):
                continue
            best = (case, peak_bytes(case))
        except ConfigError:
            continue
        if best[1] <= memory_bytes:
            break
    return best


def _sharded(case: Case) -> Iterator[Case]:
    if case.world_size > 1 and not isinstance(case.engine, FsdpEngine):
        yield _with_engine(case, FsdpEngine(staging=case.engine.staging))


def _recomputed(case: Case) -> Iterator[Case]:
    if case.recipe.train.activation_checkpointing != "full":
        yield _with_setting(case, "train", "activation_checkpointing", "full")


def _staged_at_use(case: Case) -> Iterator[Case]:
    if case.engine.staging == "auto":
        engine = case.engine.model_copy(update={"staging": "per_use"})
        asked = case.recipe.engine.model_copy(update={"staging": "per_use"})
        recipe = case.recipe.model_copy(update={"engine": asked})
        yield replace(case, recipe=recipe, engine=engine, typed=(*case.typed, "engine.staging=per_use"))


def _smaller_micro_batch(case: Case) -> Iterator[Case]:
    rows = case.recipe.batch.tokens_per_micro_batch // case.recipe.data.sequence_length
    while rows > 1:
        rows //= 2
        yield _with_setting(case, "batch", "tokens_per_micro_batch", rows * case.recipe.data.sequence_length)


def _offloaded(case: Case) -> Iterator[Case]:
    if not (isinstance(case.engine, FsdpEngine) and case.engine.cpu_offload):
        yield _with_engine(case, FsdpEngine(cpu_offload=True, staging=case.engine.staging))


def _more_ranks(case: Case) -> Iterator[Case]:
    factor = 2
    while isinstance(case.engine, FsdpEngine) and factor <= MAX_RANKS_FACTOR:
        ranks = factor * case.world_size
        yield replace(case, world_size=ranks, typed=(*case.typed, f"on {ranks} ranks"))
        factor *= 2


_STEPS: tuple[Callable[[Case], Iterator[Case]], ...] = (
    _sharded,
    _recomputed,
    _staged_at_use,
    _smaller_micro_batch,
    _offloaded,
    _more_ranks,
)
"""From what costs nothing to what costs most."""


def _with_engine(case: Case, engine: EngineConfig) -> Case:
    # One engine is typed, however many were tried.
    others = tuple(text for text in case.typed if "engine=" not in text and "engine." not in text)
    recipe = case.recipe.model_copy(update={"engine": engine})
    return replace(case, recipe=recipe, engine=engine, typed=(*others, _typed(engine)))


def _typed(engine: EngineConfig) -> str:
    options = engine.model_dump(exclude={"type"}, exclude_defaults=True)
    if not options:
        return f"engine={engine.type}"
    given = ", ".join(f"{key}: {str(value).lower()}" for key, value in options.items())
    return f"'engine={{type: {engine.type}, {given}}}'"


def _with_setting(case: Case, section: str, key: str, value: Any) -> Case:
    changed = getattr(case.recipe, section).model_copy(update={key: value})
    recipe = case.recipe.model_copy(update={section: changed})
    return replace(case, recipe=recipe, typed=(*case.typed, f"{section}.{key}={value}"))
