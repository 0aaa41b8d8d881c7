"""Several ranks: shards of every shape, other rank counts, replicas written once, faults on one rank."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from leanmill.checkpoint import storage
from leanmill.checkpoint.config import CheckpointConfig
from leanmill.checkpoint.manager import CheckpointManager
from leanmill.checkpoint.manifest import verify
from leanmill.checkpoint.reading import read_full_state, read_index
from leanmill.core.errors import RunError
from leanmill.parallel.launch import set_timeout
from tests.checkpoint.fake import FakeEngine, odd_tensors, same, zeros_of
from tests.distributed import run_ranks


def _optimizer(model: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}/exp_avg": t * 2 for name, t in model.items() if t.is_floating_point() and t.dim()}


def _shard(state: dict[str, Tensor], *, dim: int = 0, replicas: int = 1) -> dict[str, Tensor]:
    """Shard everything that has dims over all ranks, or over groups with replicas (HSDP)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    shape = (dist.get_world_size(),) if replicas == 1 else (replicas, dist.get_world_size() // replicas)
    mesh = init_device_mesh("cpu", shape)
    lead = [Replicate()] if replicas > 1 else []
    return {
        name: distribute_tensor(t, mesh, [*lead, Shard(min(dim, t.dim() - 1))]) if t.dim() else t.clone()
        for name, t in state.items()
    }


def _full(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for n, t in state.items()}  # type: ignore[operator]


def _manager(run_dir: Path, **settings: Any) -> CheckpointManager:
    return CheckpointManager(run_dir, CheckpointConfig(**settings))


def _save(run_dir: Path, wrap: Callable[[dict[str, Tensor]], dict[str, Tensor]], asynchronous: bool = True) -> None:
    model = odd_tensors()
    engine = FakeEngine(wrap(model), wrap(_optimizer(model)))
    manager = _manager(run_dir, asynchronous=asynchronous)
    manager.save(1, engine, {"step": 1}, {})
    manager.wait()


def _load(run_dir: Path, wraps: list[Callable[[dict[str, Tensor]], dict[str, Tensor]]]) -> list[tuple[Any, ...]]:
    results = []
    manager = _manager(run_dir)
    path = manager.find("auto")
    assert path is not None
    for wrap in wraps:
        model = zeros_of(odd_tensors())
        engine = FakeEngine(wrap(model), wrap(_optimizer(model)))
        state = manager.load(path, engine)
        results.append((_full(engine.model), _full(engine.optimizer), state))
    return results


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def _by_columns(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return _shard(state, dim=1)


def _hybrid(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return _shard(state, replicas=2)


def _assert_loads(run_dir: Path, world_size: int, *wraps: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    model = odd_tensors()
    for results in run_ranks(_load, world_size, run_dir, list(wraps)):
        for loaded, optimizer, state in results:
            assert same(loaded, model)
            assert same(optimizer, _optimizer(model))
            assert state == {"step": 1}


def test_four_ranks_to_two_to_one_with_uneven_shards(tmp_path: Path) -> None:
    run_ranks(_save, 4, tmp_path, _shard)
    assert same(read_full_state(tmp_path / "checkpoints/step-00000001"), odd_tensors())
    _assert_loads(tmp_path, 4, _shard)
    _assert_loads(tmp_path, 2, _shard, _by_columns, _plain)
    _assert_loads(tmp_path, 1, _shard)


def test_replicated_loads_sharded_and_is_written_once(tmp_path: Path) -> None:
    run_ranks(_save, 2, tmp_path, _plain)
    path = tmp_path / "checkpoints/step-00000001"
    assert all(len(stored.chunks) == 1 for stored in read_index(path / "model").values())
    assert [p.name for p in (path / "model").glob("*.safetensors")] == ["00000-of-00002.safetensors"]
    _assert_loads(tmp_path, 2, _shard)


def test_hybrid_shards_are_written_once(tmp_path: Path) -> None:
    run_ranks(_save, 4, tmp_path, _hybrid, False)
    path = tmp_path / "checkpoints/step-00000001"
    assert len(read_index(path / "model")["model.embed.weight"].chunks) == 2
    _assert_loads(tmp_path, 2, _by_columns)


def test_torch_reads_shards_too(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    run_ranks(_save, 2, tmp_path, _shard)
    target = {"model.experts": torch.zeros(3, 2, 5, dtype=torch.float64), "model.half.weight": torch.zeros(5, 3)}
    reader = dcp.HuggingFaceStorageReader(str(tmp_path / "checkpoints/step-00000001/model"))
    dcp.load(target, storage_reader=reader, no_dist=True)
    assert torch.equal(target["model.experts"], odd_tensors()["model.experts"])
    assert torch.equal(target["model.half.weight"], odd_tensors()["model.half.weight"].float())


def test_background_saves_do_not_meet_trainings_collectives(tmp_path: Path) -> None:
    def train() -> None:
        model = _shard({"w": torch.zeros(257, 33)})
        engine, manager = FakeEngine(model), _manager(tmp_path, keep_last=5)
        for step in range(1, 6):
            model["w"].add_(1)
            manager.save(step, engine, {"step": step}, {})
            for size in range(1, 40):
                value = torch.full((size * 11,), 1.0)
                dist.all_reduce(value)
                assert value.eq(2).all()
        manager.wait()

    run_ranks(train, 2)
    for step in range(1, 6):
        path = tmp_path / f"checkpoints/step-{step:08d}"
        assert verify(path) == []
        assert read_full_state(path)["w"].eq(step).all()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_full_disk_on_one_rank_fails_on_all(tmp_path: Path, asynchronous: bool, rank: int) -> None:
    def train() -> str:
        engine, manager = FakeEngine(_shard(odd_tensors())), _manager(tmp_path, asynchronous=asynchronous)
        manager.save(1, engine, {}, {})
        manager.wait()
        original = storage._write_all

        def full(file: Any, data: memoryview, digest: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device", file.name)

        if dist.get_rank() == rank:
            storage._write_all = full
        try:
            manager.save(2, engine, {}, {})
            manager.wait()
        except RunError as error:
            message = str(error)
        storage._write_all = original
        manager.save(3, engine, {}, {})
        manager.wait()
        return message

    for message in run_ranks(train, 2):
        assert "step-00000002 failed: the disk is full" in message
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000001", "step-00000003"]


def test_a_slow_disk_on_one_rank_outlasts_the_time_out_of_a_step(tmp_path: Path) -> None:
    def train() -> None:
        engine, manager = FakeEngine(_shard(odd_tensors())), _manager(tmp_path)
        set_timeout(1)
        original = storage._stream

        def slow(*args: Any) -> Any:
            time.sleep(1.5)
            return original(*args)

        if dist.get_rank() == 1:
            storage._stream = slow
        manager.save(1, engine, {"step": 1}, {})
        manager.wait()

    run_ranks(train, 2)
    assert verify(tmp_path / "checkpoints/step-00000001") == []


def test_ranks_share_the_verification(tmp_path: Path) -> None:
    for step in (1, 2):
        run_ranks(_save_step, 2, tmp_path, step)
    file = tmp_path / "checkpoints/step-00000002/model/00001-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)

    def find() -> tuple[str, str]:
        manager = _manager(tmp_path)
        with pytest.raises(RunError) as caught:
            manager.find(str(file.parents[1]))
        return str(manager.find("auto")), str(caught.value)

    results = run_ranks(find, 2)
    for found, message in results:
        assert found.endswith("step-00000001")
        assert str(file) in message
    assert json.loads((tmp_path / "checkpoints/step-00000001/train_state.json").read_text()) == {"step": 1}


def _save_step(run_dir: Path, step: int) -> None:
    manager = _manager(run_dir)
    manager.save(step, FakeEngine(_shard(odd_tensors())), {"step": step}, {})
    manager.wait()
