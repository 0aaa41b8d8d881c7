"""The router gradient of the global loss is that of one process on the whole batch, under every kind of engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from leanmill.core.rules import StepContext
from leanmill.models.build import build_on_meta
from leanmill.parallel.build import build_engine
from leanmill.parallel.launch import Ranks
from leanmill.recipe.root import Recipe
from leanmill.trainer.prepare import prepare
from tests.contract_cases import ENGINES
from tests.contract_models import MODELS, VOCAB_SIZE
from tests.distributed import run_ranks
from tests.parallel.cases import ranks_here


NUM_ROWS, LENGTH = 8, 16
TOLERANCE = 2e-7
"""Of an entry of a router's gradient, of a balance loss of weight 1: the order of additions in fp32. A wrong scale
would show in the gradient as a whole, which agrees to a millionth."""


def rows(padded: bool) -> dict[str, Tensor]:
    """Rows with unequal numbers of labels, and of tokens if padded."""
    generator = torch.Generator().manual_seed(3)
    batch = {
        "input_ids": torch.randint(VOCAB_SIZE, (NUM_ROWS, LENGTH), generator=generator),
        "labels": torch.randint(VOCAB_SIZE, (NUM_ROWS, LENGTH), generator=generator),
        "position_ids": torch.arange(LENGTH).expand(NUM_ROWS, -1).contiguous(),
    }
    for row in range(NUM_ROWS):
        batch["labels"][row, : 1 + (5 * row) % 13] = -100
    if padded:
        num_tokens = LENGTH - (3 * torch.arange(NUM_ROWS)) % 11
        batch["token_mask"] = torch.arange(LENGTH) < num_tokens.unsqueeze(1)
        batch["labels"][~batch["token_mask"]] = -100
    return batch


def recipe_of(
    engine: dict[str, Any], options: dict[str, Any], mode: str, num_parts: int, cross_entropy: float
) -> Recipe:
    tokens = NUM_ROWS * LENGTH
    return Recipe.model_validate(
        {
            "device": "cpu",
            "model": {"config": MODELS["mixtral"] | {"initializer_range": 0.2}},
            "data": {"sequence_length": LENGTH},
            "techniques": [{"type": "router_balance", "weight": 1.0, "z_weight": 0.0} | options],
            "engine": engine,
            "batch": {"tokens_per_step": tokens, "tokens_per_micro_batch": tokens // num_parts},
            "train": {
                "steps": 1,
                "precision": "fp32",
                "activation_checkpointing": mode,
                "cross_entropy_weight": cross_entropy,
                "max_grad_norm": None,
            },
        }
    )


def router_gradients(
    engine: dict[str, Any],
    ranks: Ranks,
    *,
    options: dict[str, Any],
    mode: str = "none",
    num_micro: int = 1,
    padded: bool = False,
    cross_entropy: float = 0.0,
) -> dict[str, Tensor]:
    """Gradients of all routers in the first step, whole."""
    recipe = recipe_of(engine, options, mode, num_micro * ranks.world_size, cross_entropy)
    model = build_on_meta(recipe.model, vocab_size=None)
    made, _ = build_engine(recipe.engine, ranks=ranks, precision="fp32", model_bytes=0)
    rules = prepare(recipe, model, made, num_micro_batches=num_micro).techniques.step_rules
    batch = rows(padded)
    parts = {name: value.chunk(num_micro * ranks.world_size) for name, value in batch.items()}
    mine = [
        {name: values[ranks.rank * num_micro + micro] for name, values in parts.items()} for micro in range(num_micro)
    ]
    for rule in rules:
        rule.begin_step(StepContext(step=0, num_steps=1, num_micro_batches=num_micro))
    made.forward_backward(mine, (batch["labels"] != -100).sum().float())
    found = {name: value.cpu().clone() for name, value in made.gradients() if name.endswith("gate.weight")}
    made.close()
    return found


CASES = [
    # (options, recomputation, micro-batches, padding, weight of cross-entropy)
    ({}, "full", 1, False, 0.0),
    ({"estimator": "two_pass"}, "none", 2, True, 0.0),
]
MORE_CASES = [
    ({}, "none", 1, False, 0.0),
    ({}, "full", 1, True, 0.0),
    ({}, "none", 1, True, 1.0),
    ({"estimator": "two_pass"}, "full", 2, False, 0.0),
    ({"estimator": "two_pass"}, "full", 2, True, 0.0),
    ({"estimator": "two_pass"}, "full", 2, True, 1.0),
]


def _of_one_process(cases: list[Any]) -> list[dict[str, Tensor]]:
    single = {"type": "single"}
    return [
        router_gradients(single, ranks_here(), options={}, padded=padded, cross_entropy=weight)
        for _, _, _, padded, weight in cases
    ]


def _of_many(engine: dict[str, Any], cases: list[Any]) -> list[dict[str, Tensor]]:
    return [
        router_gradients(
            engine, ranks_here(), options=options, mode=mode, num_micro=num, padded=padded, cross_entropy=weight
        )
        for options, mode, num, padded, weight in cases
    ]


def check(cases: list[Any], found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> None:
    for case, got, expected in zip(cases, found, wanted, strict=True):
        assert len(expected) == 2
        for name, gradient in expected.items():
            error = got[name] - gradient
            assert error.abs().max() <= TOLERANCE, f"{case} {name}"
            assert error.norm() <= 1e-6 * gradient.norm(), f"{case} {name}"


def check_ranks(engine_name: str, cases: list[Any], world_size: int) -> None:
    wanted = _of_one_process(cases)
    for found in run_ranks(lambda: _of_many(ENGINES[engine_name], cases), world_size, timeout_seconds=280):
        check(cases, found, wanted)


def test_two_ranks():
    check_ranks("fsdp", CASES, 2)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("engine_name", list(ENGINES))
def test_two_and_four_ranks(engine_name, world_size):
    check_ranks(engine_name, CASES + MORE_CASES, world_size)


def test_one_rank_with_accumulation_and_recomputation():
    cases = CASES + MORE_CASES
    check(cases, _of_many({"type": "single"}, cases), _of_one_process(cases))
