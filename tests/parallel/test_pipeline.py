"""Ranks that each have some blocks train what one process trains, parameter by parameter."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed.fsdp  # noqa: F401 (once here instead of in every forked rank)
from torch.distributed.pipelining import PipelineStage

from leanmill.parallel.config import DdpEngine, EngineConfig, FsdpEngine, LayoutConfig, SingleEngine
from leanmill.parallel.engine import Engine
from leanmill.parallel.pipeline_plan import FAMILIES, pipeline_numbers
from tests.distributed import run_ranks
from tests.parallel import cases, expert_cases, tensor_cases
from tests.parallel.test_tensor_parallel import assert_like_one_process


ENGINES: dict[str, EngineConfig] = {"ddp": DdpEngine(), "fsdp": FsdpEngine()}


def trained(config: EngineConfig, *, num_micro_batches: int, **options: Any) -> dict[str, Any]:
    """Train as `tensor_cases.trained`; gradients and weights are those of this rank."""
    engine = tensor_cases.prepared(config, num_micro_batches=num_micro_batches, fused_loss=True, **options)
    norms, losses, gradients = [], [], {}
    for step in range(3):
        micro_batches, num_valid = expert_cases.share_of(engine, step, num_micro_batches)
        rows = len(micro_batches[0]["input_ids"])
        for index, batch in enumerate(micro_batches):
            first = (engine.data_rank * num_micro_batches + index) * rows
            batch["position_ids"] = documents(range(first, first + rows), step)
        sums = engine.forward_backward(micro_batches, num_valid)
        gradients = {name: g.detach().clone() for name, g in engine.gradients()}
        norms.append(float(engine.clip(expert_cases.MAX_NORM)))
        losses.append(float(sums["total"]))
        engine.step(torch.tensor(False))
    found = {"gradients": gradients, "weights": cases.full_weights(engine), "norms": norms, "losses": losses}
    return {**found, "data_rank": engine.data_rank, "evaluated": evaluated(engine)}


def documents(rows: range, seed: int) -> torch.Tensor:
    """Positions of rows of three documents, cut at places of their own."""
    positions = torch.arange(cases.SEQUENCE_LENGTH).expand(len(rows), -1).clone()
    for index, row in enumerate(rows):
        for place in (1 + (row + seed) % 5, 7 + (3 * row + seed) % 4):
            positions[index, place:] -= positions[index, place].item()
    return positions


def evaluated(engine: Engine) -> dict[str, torch.Tensor]:
    batch = {name: value[:2] for name, value in cases.rows(9).items()}
    last = {**batch, "last": torch.tensor([3, 5])}
    return {
        "losses": engine.evaluate(batch)["cross_entropy"],
        "token_losses": engine.evaluate(batch, wanted="token_losses")["cross_entropy"],
        "next_logits": engine.evaluate(last, wanted="next_logits")["logits"],
    }


@cache
def one_process(num_micro_batches: int, **options: Any) -> dict[str, Any]:
    return trained(SingleEngine(), num_micro_batches=num_micro_batches, **options)


def check(
    engine: str,
    world_size: int,
    layout: LayoutConfig,
    *,
    num_micro_batches: int = 4,
    tolerance: float = 1e-9,
    **options: Any,
) -> None:
    wanted = one_process(num_micro_batches, **options)
    results = run_ranks(
        lambda: trained(ENGINES[engine], layout=layout, num_micro_batches=num_micro_batches, **options), world_size
    )
    whole = {kind: _together([result[kind] for result in results]) for kind in ("gradients", "weights")}
    results = [{**result, **whole} for result in results]
    assert_like_one_process(results, wanted, tolerance)
    for result in results:
        for kind, value in wanted["evaluated"].items():
            torch.testing.assert_close(result["evaluated"][kind], value, rtol=1e-5, atol=1e-5)


def _together(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What ranks have, which is equal where several have it."""
    found: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, value in part.items():
            torch.testing.assert_close(found.setdefault(name, value), value, rtol=0, atol=0)
    return found


def test_two_stages() -> None:
    check("ddp", 2, LayoutConfig(pp=2), num_micro_batches=2)


LAYOUTS: dict[str, tuple[LayoutConfig, int]] = {
    "gpipe 2": (LayoutConfig(pp=2, pp_schedule="gpipe"), 2),
    "1f1b 2": (LayoutConfig(pp=2), 2),
    "1f1b by hand": (LayoutConfig(pp=2, pp_split=(0, 3)), 2),
    "interleaved 2": (LayoutConfig(pp=2, pp_schedule="interleaved_1f1b"), 2),
    "zbv 2": (LayoutConfig(pp=2, pp_schedule="zbv"), 2),
    "1f1b 4": (LayoutConfig(pp=4), 4),
    "1f1b 2 x 2": (LayoutConfig(pp=2), 4),
    "zbv 2 x 2": (LayoutConfig(pp=2, pp_schedule="zbv"), 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("engine", ENGINES)
def test_schedules(engine: str, layout: str) -> None:
    config, world_size = LAYOUTS[layout]
    if engine == "fsdp" and config.pp_schedule == "zbv":
        pytest.skip("refused")
    check(engine, world_size, config, num_hidden_layers=5)


SIZES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 3},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2},
}
"""With windows; with windows in every other block, scaled embeddings and two kinds of rotary positions."""


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families(family: str) -> None:
    sizes = {"num_hidden_layers": 4, **SIZES.get(family, {})}
    check("ddp", 2, LayoutConfig(pp=2, pp_schedule="zbv"), num_micro_batches=2, family=family, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize("technique", ["nm_sparsity", "ternary", "lora", "lora_branch"])
@pytest.mark.parametrize(("engine", "schedule"), [("ddp", "1f1b"), ("ddp", "zbv"), ("fsdp", "interleaved_1f1b")])
def test_techniques(technique: str, engine: str, schedule: Any) -> None:
    layout = LayoutConfig(pp=2, pp_schedule=schedule)
    check(engine, 2, layout, num_micro_batches=2, technique=technique, num_hidden_layers=4)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize(("engine", "schedule"), [("ddp", "1f1b"), ("ddp", "zbv"), ("fsdp", "interleaved_1f1b")])
def test_recomputation(recompute: str, engine: str, schedule: Any) -> None:
    if (recompute, schedule) == ("selective", "zbv"):
        pytest.skip("refused")
    layout = LayoutConfig(pp=2, pp_schedule=schedule)
    check(engine, 2, layout, num_micro_batches=2, recompute=recompute, num_hidden_layers=4)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_fp32(engine: str) -> None:
    check(engine, 4, LayoutConfig(pp=2), num_micro_batches=2, tolerance=2e-5, dtype=torch.float32, num_hidden_layers=3)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_lsq(engine: str) -> None:
    options = {"technique": "lsq", "dtype": torch.float32, "num_hidden_layers": 3}
    check(engine, 2, LayoutConfig(pp=2), num_micro_batches=2, tolerance=2e-5, **options)


def counted(schedule: Any, num_micro_batches: int) -> tuple[int, int]:
    """Bytes that this rank sends in a step, and the most micro-batches that it keeps for backward."""
    layout = LayoutConfig(pp=2, pp_schedule=schedule)
    engine = tensor_cases.prepared(
        DdpEngine(), layout=layout, num_micro_batches=num_micro_batches, fused_loss=True, num_hidden_layers=4
    )
    sent, kept = 0, [0]
    send, forward = PipelineStage.get_fwd_send_ops, PipelineStage.forward_one_chunk
    send_back = PipelineStage.get_bwd_send_ops

    def counting(which: Any) -> Any:
        def ops(stage: Any, index: int) -> Any:
            nonlocal sent
            found = which(stage, index)
            sent += sum(op.tensor.nbytes for op in found)
            return found

        return ops

    def keeping(stage: Any, *args: Any, **options: Any) -> Any:
        output = forward(stage, *args, **options)
        kept.append(len(stage.fwd_cache))
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PipelineStage, "get_fwd_send_ops", counting(send))
        patch.setattr(PipelineStage, "get_bwd_send_ops", counting(send_back))
        patch.setattr(PipelineStage, "forward_one_chunk", keeping)
        engine.forward_backward(*expert_cases.share_of(engine, 0, num_micro_batches))
    return sent, max(kept)


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "kept"), [("gpipe", [4, 4]), ("1f1b", [2, 1])])
def test_what_travels_and_what_is_kept(schedule: Any, kept: list[int]) -> None:
    found = run_ranks(lambda: counted(schedule, 4), 2)
    tokens = expert_cases.ROWS * cases.SEQUENCE_LENGTH
    assert sum(sent for sent, _ in found) == 8 * pipeline_numbers(tokens, 24, 2, schedule)
    assert [most for _, most in found] == kept
