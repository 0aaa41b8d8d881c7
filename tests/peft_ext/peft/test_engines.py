"""Adapters of PEFT's methods under engines on two ranks: the weights of one process, saved and loaded whole."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partialmethod
from typing import Any

import peft  # noqa: F401 (or each forked rank would import it, for seconds)
import pytest
import torch
import torch.distributed as dist
from torch import nn

from leanmill.parallel.launch import Ranks
from leanmill.parallel.tensors import full
from leanmill.peft_ext.peft.methods import METHODS
from leanmill.recipe.root import Recipe
from tests.contract_models import MODEL, NUM_ROWS, NUM_STEPS, SEQUENCE_LENGTH
from tests.contract_training import full_parameters, train
from tests.distributed import run_ranks
from tests.peft_ext.peft.cases import raw_of


ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"type": "ddp"},
    "fsdp": {"type": "fsdp"},
    "zero1": {"type": "deepspeed", "stage": 1},
    "zero2": {"type": "deepspeed", "stage": 2},
    "zero3": {"type": "deepspeed", "stage": 3},
}
HANDFUL = {"fsdp": ("mos", "rank_lora"), "zero3": ("hra", "lora_sb")}
"""Pools that layers share, and ranks that a rule gives; a weight that is read, and a start from the gradient that
rewrites frozen tensors."""
VARIANTS = {
    "lora_sb": raw_of("core_lora", variant="lora_sb", gradient_step=1e-2),
    "moslora": raw_of("core_lora", variant="moslora"),
    "nlora": raw_of("core_lora", variant="nlora"),
    "smora": raw_of("moe_lora", r=1, num_experts=6, top_k=2, balance="bias", bias_rate=1e-2),
    "parallel": raw_of("bottleneck", placement="parallel"),
    "before": raw_of("bottleneck", targets=["up_proj", "down_proj"]),
    "earned": raw_of("rank_lora", score="factors"),
    "nested": {**raw_of("lora", r=6, variant="dylora"), "method": "rank_lora"},
    "nested_frozen": {**raw_of("lora", r=6, variant="dylora", frozen=True), "method": "rank_lora"},
    "dora": raw_of("lora", r=4, use_dora=True),
    "pissa": raw_of("lora", r=4, init_lora_weights="pissa"),
}
EVERY = (*METHODS, *VARIANTS)
OF_ITS_MICRO_BATCH = {"pvera", "lily"}
"""The first draws in every forward, the second averages its router over all tokens of a forward."""


def recipe_of(method: str, engine: dict[str, Any], world_size: int, **train_options: Any) -> Recipe:
    tokens = NUM_ROWS * SEQUENCE_LENGTH
    return Recipe.model_validate(
        {
            "device": "cpu",
            "model": {"config": MODEL | {"num_key_value_heads": 2, "tie_word_embeddings": False}},
            "data": {"sequence_length": SEQUENCE_LENGTH},
            "techniques": [VARIANTS.get(method) or raw_of(method)],
            "engine": engine,
            "optimizer": {"type": "adamw", "lr": 1e-2, "eps": 1e-3},
            "schedule": {"type": "constant", "warmup_steps": 0},
            "batch": {"tokens_per_step": tokens, "tokens_per_micro_batch": tokens // (2 * world_size)},
            "train": {"steps": NUM_STEPS, "precision": "fp32", "max_grad_norm": 0.5, **train_options},
        }
    )


def trained(methods: Sequence[str], engine: dict[str, Any], ranks: Ranks, **options: Any) -> dict[str, Any]:
    """Parameters after training; what went wrong, as text, for a method that fails."""
    results: dict[str, Any] = {}
    for method in methods:
        try:
            live, _ = train(recipe_of(method, engine, ranks.world_size, **options), ranks)
            results[method] = full_parameters(live)
            _check_state(live)
            live.close()
        except Exception as error:  # noqa: BLE001 (one method must not hide the others)
            results[method] = f"{type(error).__name__}: {error}"
    return results


def _check_state(live: Any) -> None:
    """No tensor of the state is empty, and loading it back restores what was overwritten."""
    state = {name: full(value).clone() for name, value in live.model_state().items()}
    assert all(value.numel() > 0 for value in state.values())
    live.load_model_state({name: torch.zeros_like(value) for name, value in state.items()})
    live.load_model_state(state)
    for name, value in live.model_state().items():
        assert torch.equal(full(value), state[name]), name


def _on_two_ranks(methods: Sequence[str], engine: dict[str, Any], options: dict[str, Any]) -> dict[str, Any] | None:
    rank = dist.get_rank()
    ranks = Ranks(rank=rank, world_size=2, local_rank=rank, device=torch.device("cpu"))
    results = trained(methods, engine, ranks, **options)
    return results if rank == 0 else None


ONE = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def check(engine: str, methods: Sequence[str], **options: Any) -> None:
    got = run_ranks(_on_two_ranks, 2, methods, ENGINES[engine], options, timeout_seconds=1500)[0]
    expected = trained(methods, {"type": "single"}, ONE, **options)
    wrong = [f"{method}: {result}" for method, result in got.items() if isinstance(result, str)]
    for method in methods:
        if isinstance(got[method], str) or method in OF_ITS_MICRO_BATCH:
            continue
        for name, value in expected[method].items():
            if not torch.allclose(got[method][name], value, rtol=1e-4, atol=2e-5):
                wrong.append(f"{method}: {name} differs by {(got[method][name] - value).abs().max():.1e}")
                break
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("engine", HANDFUL)
def test_a_handful_of_methods(engine: str):
    check(engine, HANDFUL[engine])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_method(engine: str):
    check(engine, EVERY)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero3"])
def test_every_method_with_recomputation(engine: str):
    check(engine, EVERY, activation_checkpointing="full")


COMPILED = ("rank_lora", "nested_frozen", "bottleneck", "before", "moe_lora", "smora", "lora_sb")
"""Tuners of our own whose layers change while they train, are called by a rule, or look at each token."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_compiled_blocks(monkeypatch, checkpointing):
    expected = trained(COMPILED, {"type": "single"}, ONE)
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    torch._dynamo.reset()
    found = trained(COMPILED, {"type": "single"}, ONE, compile=True, activation_checkpointing=checkpointing)
    for method, parameters in found.items():
        assert not isinstance(parameters, str), f"{method}: {parameters}"
        for name, value in expected[method].items():
            torch.testing.assert_close(parameters[name], value, rtol=1e-4, atol=1e-5)


def _in_bf16(methods: Sequence[str], engine: dict[str, Any]) -> list[str]:
    rank, wrong = dist.get_rank(), []
    ranks = Ranks(rank=rank, world_size=2, local_rank=rank, device=torch.device("cpu"))
    for method, parameters in trained(methods, engine, ranks, precision="bf16").items():
        if isinstance(parameters, str) or not all(value.isfinite().all() for value in parameters.values()):
            wrong.append(f"{method}: {parameters if isinstance(parameters, str) else 'not finite'}")
    return wrong


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero3"])
def test_every_method_in_bf16(engine: str):
    """FSDP2 gathers parameters in bf16, and leaves the buffers that some methods multiply them with alone."""
    assert run_ranks(_in_bf16, 2, EVERY, ENGINES[engine], timeout_seconds=1500)[0] == []
