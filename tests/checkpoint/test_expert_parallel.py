"""Checkpoints of experts that ranks share load at another number of sharers, and under another engine."""

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
from leanmill.core.errors import ConfigError
from leanmill.optim.config import Adam8bit
from leanmill.parallel.config import DdpEngine, DeepSpeedEngine, EngineConfig, FsdpEngine, SingleEngine
from leanmill.parallel.engine import Engine
from tests.distributed import run_ranks
from tests.parallel import cases
from tests.parallel import expert_cases as experts


SAVED_AT, STEPS = 2, 3


def _train_and_save(
    run_dir: Path, config: EngineConfig, ep: int, dtype: torch.dtype, **options: Any
) -> tuple[Any, Any]:
    engine = experts.prepared(config, ep=ep, dtype=dtype, **options)
    manager = CheckpointManager(run_dir, CheckpointConfig(), overlap=True)
    at_save = experts.train(engine, num_steps=SAVED_AT)["weights"]
    manager.save(SAVED_AT, engine, {"step": SAVED_AT}, {})
    manager.finish_copies()
    at_end = _go_on(engine)
    manager.wait()
    return at_save, at_end


def _load_and_train(
    run_dir: Path, config: EngineConfig, ep: int, dtype: torch.dtype, **options: Any
) -> tuple[Any, Any]:
    engine = experts.prepared(config, ep=ep, dtype=dtype, **options)
    loaded = _load(run_dir, engine)
    return loaded, _go_on(engine)


def _load(run_dir: Path, engine: Engine) -> Any:
    manager = CheckpointManager(run_dir, CheckpointConfig())
    path = manager.find("auto")
    assert path is not None
    assert manager.load(path, engine) == {"step": SAVED_AT}
    return cases.full_weights(engine)


def _go_on(engine: Engine) -> Any:
    return experts.train(engine, num_steps=STEPS - SAVED_AT, first=SAVED_AT)["weights"]


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _check(run_dir: Path, saved: tuple[Any, Any], config: EngineConfig, ep: int, world: int, dtype: Any) -> None:
    """Values are equal where they lie elsewhere; what follows is, up to the order of additions."""
    for loaded, continued in run_ranks(_load_and_train, world, run_dir, config, ep, dtype):
        assert _equal(loaded, saved[0])
        for name, value in saved[1].items():
            torch.testing.assert_close(continued[name], value, rtol=0, atol=1e-9 if dtype.itemsize == 8 else 2e-5)


def test_two_sharers_continue_bitwise_and_as_one_process(tmp_path: Path) -> None:
    where = tmp_path, FsdpEngine(), 2, torch.float64
    saved = run_ranks(_train_and_save, 2, *where)
    on_disk = read_full_state(tmp_path / "checkpoints/step-00000002")
    assert all(torch.equal(on_disk[name], value) for name, value in saved[0][0].items())
    for (at_save, at_end), (loaded, continued) in zip(saved, run_ranks(_load_and_train, 2, *where), strict=True):
        assert _equal(at_save, loaded)
        assert _equal(at_end, continued)
    _check(tmp_path, saved[0], SingleEngine(), 1, 1, torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_from_four_sharers_to_two_to_none_and_back(tmp_path: Path, name: str) -> None:
    first, other = (DdpEngine(), FsdpEngine()) if name == "ddp" else (FsdpEngine(), DdpEngine())
    for ep_saved, world_saved in [(4, 4), (2, 4), (1, 2)]:
        run_dir = tmp_path / f"{ep_saved}"
        saved = run_ranks(_train_and_save, world_saved, run_dir, first, ep_saved, torch.float64)[0]
        for ep, world in [(4, 4), (2, 4), (2, 2), (1, 2)]:
            _check(run_dir, saved, other if ep == 2 else first, ep, world, torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_and_fsdp_read_each_other(tmp_path: Path, stage: Any) -> None:
    pytest.importorskip("deepspeed")
    zero = DeepSpeedEngine(stage=stage)
    saved = run_ranks(_train_and_save, 2, tmp_path / "zero", zero, 2, torch.float32)[0]
    for config, ep, world in [(zero, 2, 2), (zero, 2, 4), (zero, 1, 2), (FsdpEngine(), 2, 4), (SingleEngine(), 1, 1)]:
        _check(tmp_path / "zero", saved, config, ep, world, torch.float32)
    saved = run_ranks(_train_and_save, 2, tmp_path / "fsdp", FsdpEngine(), 2, torch.float32)[0]
    _check(tmp_path / "fsdp", saved, zero, 2, 4, torch.float32)


@pytest.mark.slow
def test_8_bit_state_of_experts_continues_bitwise(tmp_path: Path) -> None:
    """32 experts, so that blocks of 256 fit what a rank has of them."""
    pytest.importorskip("torchao.optim")

    def body(first: bool) -> tuple[Any, Any]:
        options: dict[str, Any] = {
            "num_experts": 32,
            "make_optimizer": lambda module: experts.optimizer(module, Adam8bit(lr=1e-2)),
        }
        function = _train_and_save if first else _load_and_train
        return function(tmp_path, DdpEngine(), 2, torch.float32, **options)

    saved, loaded = (run_ranks(body, 2, first, timeout_seconds=600.0) for first in (True, False))
    written = [path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
    assert any(b"down_proj/exp_avg.scale" in data for data in written)
    for (at_save, at_end), (values, continued) in zip(saved, loaded, strict=True):
        assert _equal(at_save, values)
        assert _equal(at_end, continued)


def test_a_checkpoint_without_some_experts_is_refused_by_name(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, CheckpointConfig())
    manager.save(SAVED_AT, experts.prepared(SingleEngine()), {"step": SAVED_AT}, {})
    manager.wait()

    def body() -> str:
        engine = experts.prepared(DdpEngine(), ep=2, num_experts=10)
        with pytest.raises(ConfigError) as refusal:
            _load(tmp_path, engine)
        return str(refusal.value)

    for message in run_ranks(body, 2):
        assert "model.layers.0.mlp.experts.down_proj [8, 24, 12]" in message
        assert "[10, 24, 12]" in message
