"""8-bit optimizer state survives bit for bit, plain and sharded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from leanmill.checkpoint.components import take_apart
from leanmill.checkpoint.config import CheckpointConfig
from leanmill.checkpoint.manager import CheckpointManager
from leanmill.core.errors import ConfigError
from tests.checkpoint.fake import FakeEngine
from tests.distributed import run_ranks


torchao_optim = pytest.importorskip("torchao.optim")


def _quantised(*shape: int, seed: int = 0, filled: bool = True) -> Tensor:
    from torchao.optim.subclass_8bit import OptimState8bit

    state: Tensor = OptimState8bit.zeros(shape, True, 256)
    if filled:
        state.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    return state


def _round_trip(run_dir: Path, saved: Tensor, fresh: Tensor) -> None:
    def engine(state: Tensor) -> FakeEngine:
        return FakeEngine({"w": torch.ones(2)}, {"w/exp_avg": state, "w/step": torch.tensor(4.0)})

    manager = CheckpointManager(run_dir, CheckpointConfig())
    manager.save(1, engine(saved), {}, {})
    manager.wait()
    path = manager.find("auto")
    assert path is not None
    manager.load(path, engine(fresh))


def test_plain(tmp_path: Path) -> None:
    saved, fresh = _quantised(16, 48), _quantised(16, 48, filled=False)
    _round_trip(tmp_path, saved, fresh)
    assert torch.equal(saved.codes, fresh.codes)
    assert torch.equal(saved.scale, fresh.scale)
    assert saved.scale.ne(0).all()


def _sharded(local: Tensor, rows: int) -> Tensor:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shape = torch.Size((rows, *local.shape[1:]))
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=local.stride())


def test_sharded(tmp_path: Path) -> None:
    def body() -> None:
        saved, fresh = _quantised(8, 64, seed=dist.get_rank()), _quantised(8, 64, filled=False)
        _round_trip(tmp_path, _sharded(saved, 16), _sharded(fresh, 16))
        assert torch.equal(saved.codes, fresh.codes)
        assert torch.equal(saved.scale, fresh.scale)

    run_ranks(body, 2)


def test_uneven_shards_are_refused() -> None:
    def body() -> None:
        with pytest.raises(ConfigError, match="does not divide"):
            take_apart({"w/exp_avg": _sharded(_quantised(8, 64), 15)})

    run_ranks(body, 2)


def test_plain_state_passes_through() -> None:
    state = {"w/exp_avg": torch.ones(3), "w/step": torch.tensor(1.0)}
    assert take_apart(state) == state
