"""A few steps of training through the real preparation and loop, with everything they computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from leanmill.core.experts import is_stacked_experts
from leanmill.core.ledger import Ledger
from leanmill.data.train_data import TrainData
from leanmill.models.build import build_on_meta
from leanmill.parallel.build import build_engine
from leanmill.parallel.collectives import sum_over_ranks
from leanmill.parallel.engine import Engine
from leanmill.parallel.launch import Ranks
from leanmill.parallel.naming import state_parameters
from leanmill.parallel.tensors import full
from leanmill.recipe.root import Recipe
from leanmill.recipe.rules import micro_batches_of_step
from leanmill.trainer.loop import Loop
from leanmill.trainer.meter import Meter
from leanmill.trainer.parity.families import families_of
from leanmill.trainer.parity.rows import DrawnRows
from leanmill.trainer.prepare import prepare


Values = dict[str, Tensor]


@dataclass(kw_only=True)
class Trace:
    """What one rank saw; tensors are whole and on the CPU."""

    losses: list[dict[str, float]] = field(default_factory=list)
    """Of each step: means over all its targets, of all ranks."""
    norms: list[float] = field(default_factory=list)
    """Of each step, before clipping, as this rank had it."""
    gradients: list[Values] = field(default_factory=list)
    """Of each step, before clipping, by name."""
    start: Values = field(default_factory=dict)
    """Parameters before the first step."""
    weights: Values = field(default_factory=dict)
    """Parameters after the last step."""
    families: dict[str, str] = field(default_factory=dict)


def trace(recipe: Recipe, ranks: Ranks, *, dtype: torch.dtype = torch.float32, packed: bool = True) -> Trace:
    """Train `train.steps` steps of a recipe on drawn rows. A collective.

    Args:
        recipe: The recipe; its model is small, since everything is gathered.
        ranks: Which process this is.
        dtype: Of the parameters; fp64 where the engine takes it.
        packed: Whether rows hold several documents.
    """
    model = _model(recipe, ranks, dtype, packed)
    plain = {name for name, _ in state_parameters(model)}
    engine, _ = build_engine(
        recipe.engine,
        ranks=ranks,
        precision="bf16" if recipe.train.precision == "bf16" else "fp32",
        model_bytes=0,
        layout=recipe.layout,
    )
    num_micro_batches = micro_batches_of_step(recipe, engine.data_size)
    length = recipe.data.sequence_length
    rows = DrawnRows(
        vocab_size=model.config.vocab_size,
        sequence_length=length,
        num_rows=recipe.batch.tokens_per_step // length,
        num_micro_batches=num_micro_batches,
        packed=packed,
    )
    prepared = prepare(recipe, model, engine, num_micro_batches=num_micro_batches)
    found = Trace(families=families_of(engine.module.model, plain))  # type: ignore[arg-type]
    found.start = _parameters(engine)
    loop = Loop(
        recipe=recipe,
        engine=engine,
        data=cast(TrainData, rows),
        step_rules=prepared.techniques.step_rules,
        observers=(),
        num_steps=recipe.train.steps or 0,
        num_micro_batches=num_micro_batches,
        save=_nothing,
        evaluate=_nothing,
        before_update=lambda: found.gradients.append({name: g.cpu().clone() for name, g in engine.gradients()}),
    )
    loop.start()
    loop.meter = _Noting(engine, found)
    while loop.step < loop.num_steps:
        loop.train_step()
        loop.step += 1
    found.weights = _parameters(engine)
    engine.close()
    return found


def _model(recipe: Recipe, ranks: Ranks, dtype: torch.dtype, packed: bool) -> Any:
    model = build_on_meta(recipe.model, device_type=ranks.device.type, packed=packed, compiled=recipe.train.compile).to(
        dtype
    )
    if dtype == torch.float64 and any(is_stacked_experts(module) for module in model.modules()):
        model.set_experts_implementation("eager")  # transformers' other ways of computing experts take no fp64
    return model


class _Noting(Meter):
    """Notes what the loop tells its meter."""

    def __init__(self, engine: Engine, found: Trace) -> None:
        super().__init__(engine.device, ledger=Ledger())
        self._copies, self._found = engine.data_size, found

    def update(self, losses: Mapping[str, Tensor], num_valid: Tensor, grad_norm: Tensor, skip: Tensor) -> None:
        # Ranks that read the same data have the same sums.
        sums = {name: float(sum_over_ranks(value.double())) for name, value in losses.items()}
        scale = self._share() / float(num_valid)
        self._found.losses.append({name: value * scale for name, value in sums.items()})
        self._found.norms.append(float(grad_norm))

    def _share(self) -> float:
        world_size = float(sum_over_ranks(torch.ones(())))
        return self._copies / world_size


def _parameters(engine: Engine) -> Values:
    names = {name for name, _ in state_parameters(engine.module.model)}  # type: ignore[arg-type]
    state = engine.model_state()
    return {name: full(value).detach().cpu().clone() for name, value in state.items() if name in names}


def _nothing(step: int) -> None:
    """Neither saves nor evaluates."""
