"""8-bit optimizer state survives bit for bit, plain and sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

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


def test_parts_lie_where_their_experts_do() -> None:
    """On 2 x 2 ranks: experts cut twice have one grid, in their order; the same experts cut into rows have another."""

    def body() -> tuple[list[Any], int]:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard
        from torch.distributed.tensor.placement_types import _StridedShard

        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "ep"))
        found = []
        for placements, local in (
            ((_StridedShard(0, split_factor=2), Shard(0)), (2, 8, 64)),
            ((Shard(1), Shard(0)), (4, 4, 64)),
        ):
            state = _quantised(*local, seed=dist.get_rank())
            whole = {"run_check": False, "shape": torch.Size((8, 8, 64)), "stride": (512, 64, 1)}
            scale = take_apart({"w": DTensor.from_local(state, mesh, placements, **whole)})["w.scale"]
            assert isinstance(scale, DTensor)
            sizes, offsets = compute_local_shape_and_global_offset(scale.shape, mesh, scale.placements)
            assert torch.equal(scale.to_local().view(-1), state.scale)
            found.append((tuple(scale.shape), tuple(offsets)))
        return found, dist.get_rank()

    for (cut, rows), rank in run_ranks(body, 4):
        shard, ep = divmod(rank, 2)
        assert cut == ((4, 4), (2 * ep + shard, 0))
        assert rows == ((2, 2, 4), (ep, shard, 0))


def test_plain_state_passes_through() -> None:
    state = {"w/exp_avg": torch.ones(3), "w/step": torch.tensor(1.0)}
    assert take_apart(state) == state
