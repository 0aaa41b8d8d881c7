"""Masks, quantisers, adapters and balance on experts that ranks share: what one process trains."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed.fsdp  # once here instead of in every forked rank
import transformers.models.mixtral.modeling_mixtral  # noqa: F401
from torch import Tensor

from leanmill.core.errors import ConfigError
from leanmill.core.sites import Sites
from leanmill.core.stage import Slot, Stage
from leanmill.parallel.config import DdpEngine
from leanmill.parallel.layout import Layout
from tests import contract_cases, contract_training
from tests.distributed import run_ranks
from tests.parallel import cases
from tests.parallel import expert_cases as experts
from tests.parallel.dispatch_cases import Collectives


TECHNIQUES = {
    "balance": ("router_balance",),
    "mask": ("nm_sparsity",),
    "mask in steps": ("nm_sparsity", "lsq_row"),
    "ternary": ("ternary",),
    "rotated": ("quest_weights",),
    "mask, ternary, adapter": ("nm_sparsity", "ternary", "lora"),
    "learned mask": ("mask_llm",),
    "moving mask": ("rigl",),
    "other backward": ("bdwp",),
    "turns": ("lisa", "lsq_tensor"),
}
FAST = ("mask", "learned mask")
"""A decay that each rank adds once, and noise that depends on where an expert stands."""


def _trained(engine: dict[str, Any], name: str, ep: int, world_size: int) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    recipe = contract_training.recipe_of(("mixtral", *TECHNIQUES[name]), engine, "", world_size)
    recipe = recipe.model_copy(update={"layout": recipe.layout.model_copy(update={"ep": ep})})
    trained, _ = contract_training.train(recipe, cases.ranks_here())
    return contract_training.full_parameters(trained), trained.notes


@cache
def _reference(name: str) -> dict[str, Tensor]:
    return _trained({"type": "single"}, name, 1, 1)[0]


def _assert_like_one_process(engine: dict[str, Any], names: tuple[str, ...], world_size: int) -> dict[str, str]:
    """Return the notes of the engine by name."""
    wanted = {name: _reference(name) for name in names}
    results = run_ranks(lambda: {name: _trained(engine, name, 2, world_size) for name in names}, world_size)
    for result in results:
        for name in names:
            parameters, _ = result[name]
            assert parameters.keys() == wanted[name].keys()
            for key, value in wanted[name].items():
                torch.testing.assert_close(parameters[key], value, rtol=0, atol=2e-5, msg=lambda t, k=key: f"{k}: {t}")
    return {name: " ".join(results[0][name][1]) for name in names}


@pytest.mark.parametrize("staging", ["per_use"])
def test_stages_on_shared_experts(staging: str) -> None:
    _assert_like_one_process({"type": "ddp", "staging": staging}, FAST, 2)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_every_kind_of_stage_under_two_ranks(engine: str) -> None:
    names = tuple(name for name in TECHNIQUES if not (engine.startswith("zero") and name == "turns"))
    _assert_like_one_process(contract_cases.ENGINES[engine], names, 2)


@pytest.mark.slow
def test_replicas_of_experts_with_stages() -> None:
    """Frozen experts have no gradient to average, and learned steps are averaged as the weights are."""
    _assert_like_one_process({"type": "ddp"}, ("mask, ternary, adapter", "mask in steps", "learned mask"), 4)


@pytest.mark.slow
def test_experts_are_staged_once_a_step_on_the_ranks_that_hold_them_whole() -> None:
    """Four experts on four ranks in groups of two: each rank keeps one, and gathers the other of its two."""
    notes = _assert_like_one_process({"type": "fsdp"}, ("mask in steps", "ternary", "mask, ternary, adapter"), 4)
    assert notes["mask in steps"] == notes["ternary"] == "staging: 12 weights once a step"
    packed = _assert_like_one_process({"type": "fsdp", "gather": "packed"}, ("mask", "ternary"), 4)
    assert packed["mask"] == "staging: 12 weights once a step"


def test_recomputation_sends_no_token_again_unless_it_is_asked_to() -> None:
    """Counted in one step of a whole recipe."""

    def body() -> tuple[list[int], list[dict[str, Tensor]]]:
        counts, weights = [], []
        for recompute, resends in (("none", False), ("full", False), ("full", True)):
            recipe = contract_training.recipe_of(("mixtral",), {"type": "ddp"}, "", 2)
            layout = recipe.layout.model_copy(update={"ep": 2, "expert_chunks": 2, "expert_resend": resends})
            kept = recipe.train.model_copy(update={"activation_checkpointing": recompute})
            recipe = recipe.model_copy(update={"layout": layout, "train": kept})
            with Collectives() as collectives:
                engine, _ = contract_training.train(recipe, cases.ranks_here(), num_steps=1)
            counts.append(collectives.names().count("all_to_all_single"))
            weights.append(contract_training.full_parameters(engine))
        return counts, weights

    for (none, full, resent), weights in run_ranks(body, 2):
        # Layers x micro-batches x pieces x three ways there and three back; the last way again is left out.
        assert none == full == 2 * 2 * 2 * 6
        assert resent == none + 2 * 2 * (2 * 3 - 1)
        for name, value in weights[0].items():
            assert torch.equal(value, weights[1][name])
            assert torch.equal(value, weights[2][name])


class _OneForAll(Stage):
    slot = Slot.QUANT
    technique = "one_for_all"

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.empty(1, device="meta"))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale


def test_a_parameter_of_all_experts_is_refused() -> None:
    def install(model: Any) -> None:
        for site in Sites(model).select(["experts.*"]):
            site.put(_OneForAll())

    def body() -> str:
        with pytest.raises(ConfigError) as refusal:
            experts.prepared(DdpEngine(), ep=2, install=install)
        return str(refusal.value)

    assert "is one for all 8 experts, and layout.ep spreads them over ranks; set layout.ep=1" in run_ranks(body, 2)[0]


def test_a_layout_without_ep_divides_nothing() -> None:
    assert Layout(4).divisor("expert") == 1
