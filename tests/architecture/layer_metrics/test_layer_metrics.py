"""Norms by layer against those counted from whole tensors, on one rank and on two under every engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from leanmill.architecture.layer_metrics.rule import LayerNorms
from leanmill.core.rules import StepContext, metrics_of
from leanmill.parallel.launch import Ranks
from leanmill.parallel.views import NativeViews
from leanmill.recipe.root import Recipe
from tests.contract_cases import ENGINES
from tests.contract_models import MODEL, NUM_ROWS, SEQUENCE_LENGTH
from tests.contract_training import train
from tests.core.tiny import tiny
from tests.distributed import run_ranks


def _looked(model, *, is_reported: bool = True) -> LayerNorms:
    rule = LayerNorms(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    views = NativeViews(model, optimizer)
    with torch.no_grad():
        rule.before_optimizer(
            StepContext(step=0, num_steps=2, num_micro_batches=1, views=views, is_reported=is_reported)
        )
    return rule


def test_norms_and_shares_are_those_of_the_whole_tensors():
    model = tiny()
    ids = torch.arange(12).view(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    found = _looked(model).metrics()
    total = sum(p.grad.square().sum() for p in model.parameters() if p.requires_grad)
    blocks = {str(index): list(block.parameters()) for index, block in enumerate(model.model.layers)}
    inside = {id(p) for group in blocks.values() for p in group}
    blocks["rest"] = [p for p in model.parameters() if id(p) not in inside]
    assert found.keys() == {f"{kind}/{layer}" for kind in ("weight_norm", "gradient_share") for layer in blocks}
    for layer, group in blocks.items():
        trained = [p for p in group if p.requires_grad]
        norm = sum(p.detach().square().sum() for p in trained).sqrt()
        share = sum(p.grad.square().sum() for p in trained) / total
        assert found[f"weight_norm/{layer}"] == pytest.approx(float(norm), rel=1e-5)
        assert found[f"gradient_share/{layer}"] == pytest.approx(float(share), rel=1e-4)


def test_a_step_that_is_not_logged_is_not_looked_at():
    assert _looked(tiny(), is_reported=False).metrics() == {}


def test_a_layer_that_nothing_reached_has_no_share():
    model = tiny()
    model.model.layers[0].mlp.up_proj.weight.grad = torch.ones_like(model.model.layers[0].mlp.up_proj.weight)
    found = _looked(model).metrics()
    assert found["gradient_share/0"] == 1.0
    assert found["gradient_share/1"] == 0.0


def test_a_step_without_gradient_has_shares_of_zero():
    found = _looked(tiny()).metrics()
    shares = {name: value for name, value in found.items() if name.startswith("gradient_share/")}
    assert len(shares) == 3
    assert set(shares.values()) == {0.0}


def _recipe(engine: dict[str, Any], world_size: int) -> Recipe:
    tokens = NUM_ROWS * SEQUENCE_LENGTH
    return Recipe.model_validate(
        {
            "device": "cpu",
            "model": {"config": MODEL},
            "data": {"sequence_length": SEQUENCE_LENGTH},
            "techniques": [{"type": "layer_metrics"}],
            "engine": engine,
            "optimizer": {"type": "adamw", "lr": 1e-2},
            "batch": {"tokens_per_step": tokens, "tokens_per_micro_batch": tokens // world_size},
            "train": {"steps": 2, "precision": "fp32", "max_grad_norm": 0.1},
        }
    )


def _metrics(engine: dict[str, Any], world_size: int) -> dict[str, float]:
    rank = dist.get_rank() if world_size > 1 else 0
    ranks = Ranks(rank=rank, world_size=world_size, local_rank=rank, device=torch.device("cpu"))
    live, loop = train(_recipe(engine, world_size), ranks, num_steps=2)
    found = metrics_of(loop.step_rules)
    live.close()
    return found


@pytest.mark.parametrize(
    "engine", ["fsdp", *(pytest.param(name, marks=pytest.mark.slow) for name in ENGINES if name != "fsdp")]
)
def test_ranks_count_together(engine):
    expected = _metrics({"type": "single"}, 1)
    for found in run_ranks(_metrics, 2, ENGINES[engine], 2):
        assert found == pytest.approx(expected, rel=1e-4)
        assert any("/gradient_share/1" in name for name in found)
