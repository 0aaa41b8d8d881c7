"""Masks, quantisers and adapters on weights that ranks share: what one process trains, parameter by parameter."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed.fsdp  # once here instead of in every forked rank
import transformers.models.llama.modeling_llama  # noqa: F401
from torch import Tensor

from tests import contract_training
from tests.distributed import run_ranks
from tests.parallel import cases


TECHNIQUES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "mask": ("nm_sparsity",),
    "ternary": ("ternary",),
    "adapter in the weight": ("lora",),
    "adapter beside it": ("lora_branch",),
    "mask, ternary, adapter": ("nm_sparsity", "ternary", "lora"),
}


def _trained(engine: dict[str, Any], name: str, tp: int, world_size: int) -> dict[str, Tensor]:
    recipe = contract_training.recipe_of(TECHNIQUES[name], engine, "", world_size // tp)
    raw = recipe.model_dump(mode="json")
    raw["model"]["config"] |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    recipe = type(recipe).model_validate({**raw, "layout": {"tp": tp}})
    trained, _ = contract_training.train(recipe, cases.ranks_here())
    parameters = contract_training.full_parameters(trained)
    trained.close()
    return parameters


@cache
def _reference(name: str) -> dict[str, Tensor]:
    return _trained({"type": "single"}, name, 1, 1)


def _assert_like_one_process(engine: dict[str, Any], names: tuple[str, ...], world_size: int) -> None:
    wanted = {name: _reference(name) for name in names}
    results = run_ranks(lambda: {name: _trained(engine, name, 2, world_size) for name in names}, world_size)
    for result in results:
        for name in names:
            assert result[name].keys() == wanted[name].keys()
            for key, value in wanted[name].items():
                torch.testing.assert_close(
                    result[name][key], value, rtol=0, atol=2e-5, msg=lambda t, k=f"{name}, {key}": f"{k}: {t}"
                )


def test_a_mask_an_adapter_and_levels_of_whole_weights() -> None:
    _assert_like_one_process({"type": "ddp"}, ("mask, ternary, adapter",), 2)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_every_kind_of_stage(engine: str, world_size: int) -> None:
    _assert_like_one_process({"type": engine}, tuple(TECHNIQUES), world_size)
