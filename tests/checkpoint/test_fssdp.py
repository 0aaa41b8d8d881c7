"""Checkpoints of fully sharded experts hold whole ones by name, whoever owns them, and load wherever experts lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp  # once here instead of in every forked rank
from torch import Tensor

from leanmill.checkpoint.config import CheckpointConfig
from leanmill.checkpoint.manager import CheckpointManager
from leanmill.checkpoint.reading import read_full_state
from leanmill.parallel.config import DdpEngine, EngineConfig, FsdpEngine, SingleEngine
from tests.distributed import run_ranks
from tests.parallel import cases
from tests.parallel import expert_cases as experts


SAVED_AT, STEPS = 2, 5
SHARDED = {"experts": {"materialise": "fewest_bytes", "move_every_steps": 2}}
"""Owners change at the save, and after it by loads counted before and after."""


def _train_and_save(run_dir: Path, config: EngineConfig, exchange: dict[str, Any], first_steps: int) -> Any:
    engine = experts.prepared(config, **exchange)
    manager = CheckpointManager(run_dir, CheckpointConfig(), overlap=True)
    at_save = experts.train(engine, num_steps=first_steps)["weights"]
    manager.save(first_steps, engine, {"step": first_steps, "engine": engine.state_dict()}, {})
    manager.finish_copies()
    at_end = experts.train(engine, num_steps=STEPS - first_steps, first=first_steps)["weights"]
    manager.wait()
    return at_save, at_end, engine.state_dict()


def _load_and_train(run_dir: Path, config: EngineConfig, exchange: dict[str, Any], first_steps: int) -> Any:
    engine = experts.prepared(config, **exchange)
    manager = CheckpointManager(run_dir, CheckpointConfig())
    path = manager.find("auto")
    assert path is not None
    engine.load_state_dict(manager.load(path, engine)["engine"])
    loaded = cases.full_weights(engine)
    at_end = experts.train(engine, num_steps=STEPS - first_steps, first=first_steps)["weights"]
    return loaded, at_end, engine.state_dict()


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _check(run_dir: Path, saved: Any, config: EngineConfig, exchange: dict[str, Any], world_size: int) -> None:
    results = run_ranks(_load_and_train, world_size, run_dir, config, exchange, SAVED_AT)
    for loaded, at_end, _ in results:
        assert _equal(loaded, saved[0])
        for name, value in saved[1].items():
            torch.testing.assert_close(at_end[name], value, rtol=0, atol=1e-9)


def test_a_resumed_run_continues_bitwise_with_its_owners_and_as_one_process(tmp_path: Path) -> None:
    # Between two moves, so that loads counted before the save decide the next owners.
    where = tmp_path, FsdpEngine(), SHARDED, 3
    saved = run_ranks(_train_and_save, 2, *where)
    on_disk = read_full_state(tmp_path / "checkpoints/step-00000003")
    assert all(torch.equal(on_disk[name], value) for name, value in saved[0][0].items())
    for one, other in zip(saved, run_ranks(_load_and_train, 2, *where), strict=True):
        assert _equal(one[0], other[0])
        assert _equal(one[1], other[1])
        assert one[2] == other[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_to_other_numbers_of_ranks_to_groups_to_none_and_back(tmp_path: Path, name: str) -> None:
    first, other = (DdpEngine(), FsdpEngine()) if name == "ddp" else (FsdpEngine(), DdpEngine())
    saved = run_ranks(_train_and_save, 4, tmp_path / "sharded", first, SHARDED, SAVED_AT)[0]
    for config, exchange, world_size in [
        (first, SHARDED, 2),
        (other, SHARDED, 4),
        (other, {"ep": 2}, 4),
        (first, {}, 2),
        (SingleEngine(), {}, 1),
    ]:
        _check(tmp_path / "sharded", saved, config, exchange, world_size)
    for exchange in ({"ep": 2}, {}):
        run_dir = tmp_path / f"from {exchange}"
        saved = run_ranks(_train_and_save, 2, run_dir, other, exchange, SAVED_AT)[0]
        _check(run_dir, saved, first, SHARDED, 4)
