"""The real engines: a checkpoint of one continues on another, at another number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp  # with the next, once here instead of in every forked rank
import transformers.models.llama.modeling_llama  # noqa: F401
from torch import Tensor, nn

from leanmill.checkpoint.config import CheckpointConfig
from leanmill.checkpoint.manager import CheckpointManager
from leanmill.checkpoint.reading import read_full_state
from leanmill.optim.build import build_optimizer
from leanmill.optim.config import AdamW, Lion, LookaheadConfig, OptimizerConfig
from leanmill.parallel.build import build_engine
from leanmill.parallel.config import DdpEngine, DeepSpeedEngine, EngineConfig, FsdpEngine, SingleEngine
from leanmill.parallel.engine import Engine
from tests.distributed import run_ranks
from tests.parallel import cases


LOOKAHEAD = AdamW(lr=0.01, lookahead=LookaheadConfig(every=3))
SAVED_AT, STEPS = 2, 4


def _engine(config: EngineConfig, optimizer: OptimizerConfig, dtype: torch.dtype) -> Engine:
    def make_optimizer(module: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(optimizer, module.model.named_parameters())  # type: ignore[union-attr]

    engine, _ = build_engine(config, ranks=cases.ranks_here(), precision="fp32", model_bytes=0)
    engine.prepare(cases.make_module(dtype), cases.preparation(make_optimizer))
    return engine


def _train_and_save(
    run_dir: Path, config: EngineConfig, optimizer: OptimizerConfig = LOOKAHEAD, dtype: torch.dtype = torch.float64
) -> tuple[Any, Any]:
    """Save at step 2 and go on to step 4, with the copies beside the third step's passes."""
    engine = _engine(config, optimizer, dtype)
    manager = CheckpointManager(run_dir, CheckpointConfig(), overlap=True)
    at_save: Any = cases.train(engine, num_steps=SAVED_AT)["weights"]
    manager.save(SAVED_AT, engine, {"step": SAVED_AT}, {})
    manager.finish_copies()
    at_end: Any = cases.train(engine, num_steps=STEPS - SAVED_AT, first=SAVED_AT)["weights"]
    manager.wait()
    engine.close()
    return at_save, at_end


def _load_and_train(
    run_dir: Path, config: EngineConfig, optimizer: OptimizerConfig = LOOKAHEAD, dtype: torch.dtype = torch.float64
) -> tuple[Any, Any]:
    engine = _engine(config, optimizer, dtype)
    manager = CheckpointManager(run_dir, CheckpointConfig())
    path = manager.find("auto")
    assert path is not None
    assert manager.load(path, engine) == {"step": SAVED_AT}
    loaded = cases.full_weights(engine)
    at_end: Any = cases.train(engine, num_steps=STEPS - SAVED_AT, first=SAVED_AT)["weights"]
    engine.close()
    return loaded, at_end


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize(("config", "optimizer"), [(DdpEngine(), Lion(lr=0.01)), (FsdpEngine(), LOOKAHEAD)])
def test_the_same_ranks_continue_bitwise(tmp_path: Path, config: EngineConfig, optimizer: OptimizerConfig) -> None:
    saved = run_ranks(_train_and_save, 2, tmp_path, config, optimizer)
    resumed = run_ranks(_load_and_train, 2, tmp_path, config, optimizer)
    for (at_save, at_end), (loaded, continued) in zip(saved, resumed, strict=True):
        assert _equal(at_save, loaded)
        assert _equal(at_end, continued)
    assert not _equal(*saved[0])


def test_fsdp_on_four_ranks_continues_on_two_and_on_one(tmp_path: Path) -> None:
    at_save, at_end = run_ranks(_train_and_save, 4, tmp_path, FsdpEngine())[0]
    on_disk = read_full_state(tmp_path / "checkpoints/step-00000002")
    assert all(torch.equal(on_disk[name], value) for name, value in at_save.items())
    for world_size, config in [(2, FsdpEngine()), (1, SingleEngine())]:
        for loaded, continued in run_ranks(_load_and_train, world_size, tmp_path, config):
            assert _equal(loaded, at_save)
            _close(continued, at_end)


def test_ddp_continues_as_fsdp(tmp_path: Path) -> None:
    at_save, at_end = run_ranks(_train_and_save, 2, tmp_path, DdpEngine())[0]
    for loaded, continued in run_ranks(_load_and_train, 2, tmp_path, FsdpEngine()):
        assert _equal(loaded, at_save)
        _close(continued, at_end)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_and_fsdp_read_each_other(tmp_path: Path, stage: Any) -> None:
    pytest.importorskip("deepspeed")
    zero, optimizer = DeepSpeedEngine(stage=stage), AdamW(lr=0.01)
    for first, second in [(zero, FsdpEngine()), (FsdpEngine(), zero), (zero, zero)]:
        run_dir = tmp_path / f"{first.type}-{second.type}"
        at_save, _ = run_ranks(_train_and_save, 2, run_dir, first, optimizer, torch.float32)[0]
        for loaded, _ in run_ranks(_load_and_train, 2, run_dir, second, optimizer, torch.float32):
            assert _equal(loaded, at_save)
