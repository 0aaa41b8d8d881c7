"""Experts sharded over all ranks, each on one, train what one process trains: gradients, norms and weights.

With accumulation, recomputation, unequal numbers of targets, ranks whose tokens all go to the same experts, and
owners that change after every step.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp  # once here instead of in every forked rank
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

from leanmill.core.errors import ConfigError
from leanmill.parallel import fssdp_travel
from leanmill.parallel.config import DdpEngine, EngineConfig, FsdpEngine, SingleEngine
from leanmill.parallel.fssdp_placement import contiguous_owners
from tests.distributed import run_ranks
from tests.parallel import cases
from tests.parallel import expert_cases as experts
from tests.parallel.dispatch_cases import Collectives
from tests.parallel.test_expert_parallel import assert_like_one_process


ENGINES: dict[str, EngineConfig] = {"ddp": DdpEngine(), "fsdp": FsdpEngine(), "hybrid": FsdpEngine(shard_size=2)}


@cache
def reference(dtype: torch.dtype = torch.float64, num_experts: int = experts.NUM_EXPERTS) -> dict[str, Any]:
    return experts.train(experts.prepared(SingleEngine(), dtype=dtype, num_experts=num_experts))


def trained(
    config: EngineConfig, num_micro_batches: int = 1, *, options: dict[str, Any], **rest: Any
) -> tuple[dict[str, Any], list[list[int]]]:
    engine: Any = experts.prepared(
        config, experts={"move_every_steps": 1, **options}, num_micro_batches=num_micro_batches, **rest
    )
    found = experts.train(engine, num_micro_batches=num_micro_batches)
    return found, engine.state_dict()["experts"]["owners"]


def check(results: list[Any], wanted: dict[str, Any], atol: float) -> list[list[int]]:
    assert_like_one_process([result for result, _ in results], wanted, atol)
    owners = results[0][1]
    assert all(other == owners for _, other in results)
    return owners  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "num_micro_batches", "recompute", "materialise"),
    [("ddp", 3, "none", "loaded"), ("fsdp", 3, "full", "fewest_bytes")],
)
def test_two_ranks_train_what_one_does(name: str, num_micro_batches: int, recompute: str, materialise: str) -> None:
    options = {"materialise": materialise}
    results = run_ranks(lambda: trained(ENGINES[name], num_micro_batches, options=options, recompute=recompute), 2)
    owners = check(results, reference(), atol=1e-12)
    assert any(layer != contiguous_owners(experts.NUM_EXPERTS, 2) for layer in owners), "nothing has moved"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(("name", "world_size"), [("ddp", 2), ("fsdp", 2), ("ddp", 4), ("fsdp", 4), ("hybrid", 4)])
def test_ranks_train_what_one_does(name: str, world_size: int, dtype: torch.dtype) -> None:
    grid = list(itertools.product((1, 3), ("none", "full", "selective"), ("loaded", "fewest_bytes")))

    def body() -> list[Any]:
        return [
            trained(ENGINES[name], number, options={"materialise": materialise}, recompute=recompute, dtype=dtype)
            for number, recompute, materialise in grid
        ]

    for results in zip(*run_ranks(body, world_size, timeout_seconds=280), strict=True):
        check(list(results), reference(dtype), atol=1e-12 if dtype == torch.float64 else 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
@pytest.mark.parametrize(("num_experts", "world_size"), [(7, 2), (3, 4), (6, 4)])
def test_ranks_may_own_unequal_numbers_of_experts(name: str, num_experts: int, world_size: int) -> None:
    for options in ({"materialise": "loaded"}, {"rematerialise": False}):
        results = run_ranks(lambda o=options: trained(ENGINES[name], options=o, num_experts=num_experts), world_size)
        owners = check(results, reference(num_experts=num_experts), atol=1e-12)
        owned = [sum(layer.count(rank) for layer in owners) for rank in range(world_size)]
        assert max(owned) - min(owned) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_bf16_is_close(name: str) -> None:
    engine = experts.prepared(SingleEngine(), dtype=torch.float32)
    engine.forward_backward(*experts.share_of(engine, 0, 1))
    wanted = dict(engine.gradients())

    def body() -> dict[str, torch.Tensor]:
        engine = experts.prepared(
            ENGINES[name], dtype=torch.float32, precision="bf16", experts={"materialise": "loaded"}
        )
        engine.forward_backward(*experts.share_of(engine, 0, 1))
        return {name: g.clone() for name, g in engine.gradients()}

    for found in run_ranks(body, 2):
        for name_of, gradient in wanted.items():
            assert (found[name_of] - gradient).norm() / gradient.norm() < 0.2, name_of


def _held_after_forward(recompute: str, rematerialise: bool) -> tuple[int, int]:
    """Bytes of copies that live after a forward, and exchanges of a step."""
    engine: Any = experts.prepared(
        DdpEngine(), recompute=recompute, experts={"materialise": "loaded", "rematerialise": rematerialise}
    )
    made, calls, live = [], [], []
    fill = fssdp_travel.Copies.fill

    def noted(copies: Any, held: Any, own: Any) -> None:
        fill(copies, held, own)
        calls.append(1)
        made.extend(weight.untyped_storage() for weight in held)

    def at_backward(_: Any) -> None:
        live.append(sum(storage.nbytes() for storage in made))

    micro_batches, num_valid = experts.share_of(engine, 0, 1)
    with patch.object(fssdp_travel.Copies, "fill", noted):
        engine.module.model.lm_head.register_forward_hook(lambda *_: at_backward(_))
        engine.forward_backward(micro_batches, num_valid)
    return live[0], len(calls)


def test_copies_are_gone_between_forward_and_backward() -> None:
    def body() -> list[tuple[int, int]]:
        return [_held_after_forward(*case) for case in (("none", True), ("full", True), ("none", False))]

    for dropped, recomputed, kept in run_ranks(body, 2):
        assert dropped == (0, 4)
        assert recomputed == (0, 4)
        assert kept[0] > 0
        assert kept[1] == 2


def test_what_cannot_be_sharded_is_refused() -> None:
    from tests import contract_training

    def body() -> list[str]:
        messages = []
        for names in (("mixtral", "nm_sparsity"), ()):
            recipe = contract_training.recipe_of(names, {"type": "ddp"}, "", 2)
            layout = recipe.layout.model_validate({"experts": "fully_sharded"})
            with pytest.raises(ConfigError) as refusal:
                contract_training.train(recipe.model_copy(update={"layout": layout}), cases.ranks_here())
            messages.append(str(refusal.value))
        engine = experts.prepared(DdpEngine(), experts="fully_sharded")
        with pytest.raises(ConfigError, match="a step rule reads model.layers.0.mlp.experts.gate_up_proj"):
            engine.views.named("model.layers.0.mlp.experts.gate_up_proj")
        return messages

    for staged, dense in run_ranks(body, 2):
        assert "carries stages of a technique" in staged
        assert "and this model has no experts; remove it" in dense


def test_recomputation_sends_no_token_again_unless_it_is_asked_to() -> None:
    def sent(recompute: str, **exchange: Any) -> int:
        engine: Any = experts.prepared(
            DdpEngine(), recompute=recompute, experts={"materialise": "fewest_bytes"}, **exchange
        )
        micro_batches, num_valid = experts.share_of(engine, 0, 1)
        with Collectives() as collectives:
            engine.forward_backward(micro_batches, num_valid)
        assert collectives.bytes_sent(dist.get_rank()) > 0
        return collectives.names().count("all_to_all_single")

    def body() -> tuple[int, ...]:
        return sent("none"), sent("full"), sent("full", expert_resend=True)

    for once, recomputed, resent in run_ranks(body, 2):
        assert once == recomputed < resent
