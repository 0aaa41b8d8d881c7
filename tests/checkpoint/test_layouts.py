"""Every checkpoint goes on under every engine and number of ranks: weights, masks, moments, rules and schedule."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp  # with the next, once here instead of in every forked rank
import transformers.models.mixtral.modeling_mixtral  # noqa: F401
from torch import Tensor

from leanmill.checkpoint.config import CheckpointConfig
from leanmill.checkpoint.manager import CheckpointManager
from leanmill.core.rules import state_of
from leanmill.models.build import build_on_meta
from leanmill.parallel.build import build_engine
from leanmill.parallel.engine import Engine
from leanmill.parallel.tensors import full
from leanmill.recipe.root import Recipe
from leanmill.trainer.loop import Loop
from leanmill.trainer.prepare import prepare
from tests.contract_models import MODELS, NUM_ROWS, SEQUENCE_LENGTH
from tests.contract_training import FixedRows
from tests.distributed import run_ranks
from tests.parallel import cases


SAVED_AT, STEPS = 2, 3

PLACES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "single": (1, {"type": "single"}, {}),
    "ddp": (2, {"type": "ddp"}, {}),
    "fsdp": (2, {"type": "fsdp"}, {}),
    "fsdp on 4": (4, {"type": "fsdp"}, {}),
    "hsdp": (4, {"type": "fsdp", "shard_size": 2}, {}),
    "experts on 2": (2, {"type": "fsdp"}, {"ep": 2}),
    "experts on 4": (4, {"type": "ddp"}, {"ep": 4}),
    "zero1": (2, {"type": "deepspeed", "stage": 1}, {}),
    "zero2": (2, {"type": "deepspeed", "stage": 2}, {"ep": 2}),
    "zero3": (2, {"type": "deepspeed", "stage": 3}, {}),
    "zero3 on 4": (4, {"type": "deepspeed", "stage": 3}, {}),
}
"""Ranks, engine and layout; another one is a line."""

TECHNIQUES = [
    # Masks and a rule that changed them once, learned scales, and a loss with loads of the last step.
    {"type": "rigl", "density": 0.5, "update_every_steps": 1, "drop_fraction": 0.3, "update_until": 0.6},
    {"type": "lsq", "weight_bits": 4, "granularity": "row"},
    {"type": "router_balance", "estimator": "two_pass"},
]


def _recipe(place: str) -> Recipe:
    world_size, engine, layout = PLACES[place]
    tokens = NUM_ROWS * SEQUENCE_LENGTH
    return Recipe.model_validate(
        {
            "device": "cpu",
            "model": {"config": MODELS["mixtral"]},
            "data": {"sequence_length": SEQUENCE_LENGTH},
            "techniques": TECHNIQUES,
            "engine": engine,
            "layout": layout,
            "optimizer": {"type": "adamw", "lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1},
            "schedule": {"type": "cosine", "warmup_steps": 1},
            "batch": {"tokens_per_step": tokens, "tokens_per_micro_batch": tokens // (2 * world_size)},
            "train": {"steps": STEPS, "precision": "fp32", "max_grad_norm": 0.5},
        }
    )


def _prepared(place: str, rule_states: Mapping[str, Any] | None = None) -> tuple[Engine, Loop]:
    recipe = _recipe(place)
    model = build_on_meta(recipe.model)
    engine, _ = build_engine(
        recipe.engine, ranks=cases.ranks_here(), precision="fp32", model_bytes=0, layout=recipe.layout
    )
    prepared = prepare(recipe, model, engine, num_micro_batches=2, rule_states=rule_states)
    loop = Loop(
        recipe=recipe,
        engine=engine,
        data=FixedRows(),  # type: ignore[arg-type]
        step_rules=prepared.techniques.step_rules,
        observers=(),
        num_steps=STEPS,
        num_micro_batches=2,
        save=lambda step: None,
        evaluate=lambda step: None,
    )
    loop.start()
    return engine, loop


def _train(loop: Loop, until: int) -> None:
    while loop.step < until:
        loop.train_step()
        loop.step += 1


def _state(engine: Engine) -> dict[str, Tensor]:
    """Everything that is saved of tensors, whole."""
    state = {f"model/{name}": value for name, value in engine.model_state().items()}
    state |= {f"optimizer/{name}": value for name, value in engine.optimizer_state().items()}
    return {name: full(value).detach().cpu().clone() for name, value in state.items()}


def _saved(place: str, run_dir: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Save after two steps and go on; return the state then and at the end."""
    engine, loop = _prepared(place)
    _train(loop, SAVED_AT)
    manager = CheckpointManager(run_dir, CheckpointConfig())
    state = {"step": loop.step, "tokens": loop.data.position_tokens, "rules": state_of(loop.step_rules)}
    manager.save(loop.step, engine, state, {})
    manager.wait()
    then = _state(engine)
    _train(loop, STEPS)
    at_end = _state(engine)
    engine.close()
    return then, at_end


def _continued(place: str, run_dirs: Mapping[str, Path]) -> dict[str, Any]:
    """Go on from each of some checkpoints; return the state as loaded and at the end."""
    found = {}
    for source, run_dir in run_dirs.items():
        manager = CheckpointManager(run_dir, CheckpointConfig())
        path = manager.find("auto")
        assert path is not None
        engine, loop = _prepared(place, manager.train_state(path)["rules"])
        state = manager.load(path, engine)
        loop.step, loop.data.position_tokens = state["step"], state["tokens"]  # type: ignore[misc]
        loaded = _state(engine)
        _train(loop, STEPS)
        found[source] = loaded, _state(engine)
        engine.close()
    return found


def _on(place: str, body: Any, *arguments: Any) -> Any:
    """Return what rank 0 has, or the only process."""
    world_size = PLACES[place][0]
    return body(place, *arguments) if world_size == 1 else run_ranks(body, world_size, place, *arguments)[0]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By place: a run folder, the state that was saved, and where the run got to."""
    made: dict[str, tuple[Path, dict[str, Tensor], dict[str, Tensor]]] = {}

    def of(place: str) -> tuple[Path, dict[str, Tensor], dict[str, Tensor]]:
        if place not in made:
            run_dir = tmp_path_factory.mktemp("run")
            made[place] = (run_dir, *_on(place, _saved, run_dir))
        return made[place]

    return of


def _goes_on(target: str, sources: list[str], checkpoints: Any) -> None:
    found = _on(target, _continued, {source: checkpoints(source)[0] for source in sources})
    for source in sources:
        _, saved, at_end = checkpoints(source)
        loaded, continued = found[source]
        assert loaded.keys() == saved.keys(), source
        assert any("stages.mask" in name for name in saved)
        for name, value in saved.items():
            assert torch.equal(loaded[name], value), f"{source} -> {target}: {name}"
        assert any(not torch.equal(at_end[name], value) for name, value in saved.items())
        for name, value in at_end.items():
            torch.testing.assert_close(
                continued[name].float(),
                value.float(),
                rtol=1e-4,
                atol=2e-5,
                msg=lambda text, n=name: f"{source} -> {target}: {n}: {text}",  # noqa: B023
            )


@pytest.mark.parametrize(("source", "target"), [("fsdp", "single"), ("fsdp", "experts on 2")])
def test_goes_on_elsewhere(source: str, target: str, checkpoints: Any) -> None:
    _goes_on(target, [source], checkpoints)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", PLACES)
def test_every_checkpoint_goes_on(target: str, checkpoints: Any) -> None:
    _goes_on(target, list(PLACES), checkpoints)
