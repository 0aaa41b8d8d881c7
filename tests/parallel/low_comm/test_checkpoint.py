"""What workers find in a checkpoint that other numbers of them wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from leanmill.checkpoint.config import CheckpointConfig
from leanmill.checkpoint.manager import CheckpointManager
from leanmill.checkpoint.reading import read_full_state
from leanmill.parallel.low_comm.outer import OuterSteps
from leanmill.parallel.tensors import full
from tests.distributed import run_ranks
from tests.parallel.cases import full_weights
from tests.parallel.low_comm.worker_cases import layout_of, train, workers_here


pytestmark = pytest.mark.slow
OPTIONS = {"every_steps": 2, "lr": 0.5, "momentum": 0.5}


def _manager(folder: Path, outer: OuterSteps) -> CheckpointManager:
    rank = dist.get_rank() % outer.layout.step_size
    return CheckpointManager(folder, CheckpointConfig(asynchronous=False), worker=(outer.worker, rank))


def _whole(tensor: Tensor) -> Tensor:
    return full(tensor.detach())


def _check(folder: Path, outer: OuterSteps, source: int) -> None:
    """Load and compare with what the saved worker `source` had."""
    path = folder / "checkpoints/step-00000003"
    assert _manager(folder, outer).load(path, outer) == {"step": 3}
    workers = read_full_state(path, "workers")
    own = {name.partition("/")[2]: t for name, t in workers.items() if name.startswith(f"{source}/")}
    own |= {f"optimizer/{name}": value for name, value in read_full_state(path, "optimizer").items() if not source}
    for name, value in outer.worker_state().items():
        assert torch.equal(_whole(value), own[name]), name
    for part, state in {"model": outer.model_state(), "outer": outer.outer_state()}.items():
        saved = read_full_state(path, part)  # type: ignore[arg-type]
        assert saved.keys() == state.keys()
        for name, value in state.items():
            assert torch.equal(_whole(value), saved[name]), name
    assert all(momentum.any() for momentum in read_full_state(path, "outer").values())


def test_other_numbers_of_workers_take_what_there_is(tmp_path: Path) -> None:
    def save() -> None:
        outer = workers_here("single", layout_of(workers=2, **OPTIONS))
        train(outer, 0, 3, num_steps=9)
        _manager(tmp_path, outer).save(3, outer, {"step": 3}, {})
        # One worker of two ranks, as the first of the two was.
        _check(tmp_path, workers_here("fsdp", layout_of(workers=1, **OPTIONS)), 0)

    def load() -> None:
        _check(tmp_path, workers_here("single", layout_of(workers=3, **OPTIONS)), dist.get_rank() % 2)

    run_ranks(save, 2)
    run_ranks(load, 3)


def test_a_checkpoint_of_ranks_that_step_together_begins_workers(tmp_path: Path) -> None:
    def body() -> None:
        outer = workers_here("single", layout_of(workers=2, **OPTIONS))
        train(outer, 0, 2, num_steps=9)
        together = workers_here("fsdp", layout_of(workers=1, **OPTIONS)).engine
        CheckpointManager(tmp_path, CheckpointConfig(asynchronous=False)).save(7, together, {"step": 7}, {})
        _manager(tmp_path, outer).load(tmp_path / "checkpoints/step-00000007", outer)
        for name, value in full_weights(together).items():
            assert torch.equal(full_weights(outer.engine)[name], value)

    run_ranks(body, 2)
