"""What of a layout is refused when a recipe is read, with what to type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from leanmill.core.errors import ConfigError
from leanmill.recipe.io import load_recipe, validate_recipe
from leanmill.recipe.root import Recipe
from leanmill.recipe.schema import recipe_schema


def recipe(**sections: Any) -> Recipe:
    config = {"model_type": "mixtral", "num_local_experts": 8}
    rest = {"model": {"config": config}, "train": {"steps": 1}, "data": {"sequence_length": 1024}}
    return Recipe.model_validate(rest | sections)


ZERO = [{"type": "deepspeed", "stage": stage} for stage in range(4)]
OFFLOADED = {"type": "deepspeed", "offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize("engine", ["auto", "ddp", "fsdp", *ZERO, OFFLOADED])
def test_engines_that_share_experts(engine: Any) -> None:
    assert recipe(engine=engine, layout={"ep": 4}).layout.ep == 4
    if engine == "ddp":
        assert recipe(engine=engine, layout={"ep": 4}, optimizer={"type": "adamw8bit"}).layout.ep == 4


@pytest.mark.parametrize("engine", ["auto", "ddp", "fsdp"])
def test_naming_an_option_of_fully_sharded_experts_asks_for_them(engine: Any) -> None:
    named = recipe(engine=engine, layout={"experts": "fully_sharded"}).layout
    assert named == recipe(engine=engine, layout={"experts": {"move_every_steps": 100}}).layout
    assert (named.num_expert_ranks(6), recipe(layout={"ep": 4}).layout.num_expert_ranks(8)) == (6, 4)


@pytest.mark.parametrize("value", [None, 3, ["spread"], {"type": "spread", "materialise": "loaded"}])
def test_experts_that_are_no_section(value: Any) -> None:
    with pytest.raises(ConfigError, match="experts"):
        validate_recipe({"layout": {"experts": value}}, source="recipe")


def test_the_schema_has_the_short_form_of_experts() -> None:
    experts = recipe_schema()["$defs"]["LayoutConfig"]["properties"]["experts"]
    assert experts["if"] == {"type": "string"}
    assert experts["then"]["enum"] == ["fully_sharded", "spread"]
    required = [choice["if"]["required"] for choice in experts["else"]["allOf"]]
    assert sorted(required) == [[], ["type"]]


def test_an_override_below_the_short_form_of_experts(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    raw = recipe(engine="fsdp").model_dump(mode="json", exclude_unset=True) | {"layout": {"experts": "fully_sharded"}}
    path.write_text(json.dumps(raw), encoding="utf-8")
    experts = load_recipe(path, ["layout.experts.materialise=loaded"]).layout.experts
    assert (experts.type, experts.materialise) == ("fully_sharded", "loaded")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"engine": "single", "layout": {"ep": 2}}, "engine=single is one; type engine=fsdp, or layout.ep=1"),
        (
            {"engine": "fsdp", "optimizer": {"type": "adamw8bit"}, "layout": {"ep": 2}},
            "type engine=ddp, or set optimizer",
        ),
        (
            {
                "engine": {"type": "deepspeed", "stage": 3, "offload_optimizer": {"device": "nvme", "path": "/tmp"}},
                "layout": {"ep": 2},
            },
            "set engine.offload_optimizer.device=cpu, or layout.ep=1",
        ),
        ({"layout": {"ep": 3}}, "does not divide model.config.num_local_experts=8; set layout.ep=2 or 4"),
        ({"layout": {"ep": 0}}, "layout.ep"),
        ({"layout": {"ep": 2, "expert_chunks": 0}}, "layout.expert_chunks"),
        ({"layout": {"expert_chunks": 2}}, "layout.expert_chunks=2 is about tokens .* set layout.ep, or remove it"),
        ({"layout": {"expert_resend": True}}, "layout.expert_resend=true is about tokens"),
        ({"layout": {"ep": 2, "expert_resend": True}}, "set train.activation_checkpointing=full, or remove it"),
        (
            {"engine": "fsdp", "layout": {"experts": "fully_sharded", "expert_resend": True}},
            "set train.activation_checkpointing=full, or remove it",
        ),
        (
            {"engine": "fsdp", "layout": {"experts": "fully_sharded", "expert_chunks": 2}},
            "layout.expert_chunks=2 is about tokens",
        ),
        ({"layout": {"ep": 2, "experts": "fully_sharded"}}, "over all ranks, and layout.ep=2 over groups of them"),
        ({"engine": "single", "layout": {"experts": "fully_sharded"}}, "engine=single is one; type engine=fsdp, or"),
        (
            {"engine": "deepspeed", "layout": {"experts": "fully_sharded"}},
            "do not allow; type engine=fsdp",
        ),
        (
            {"engine": {"type": "fsdp", "cpu_offload": True}, "layout": {"experts": "fully_sharded"}},
            "keeps them in host memory; remove the offload",
        ),
        (
            {"optimizer": {"type": "adamw8bit", "lr": 1e-3}, "layout": {"experts": "fully_sharded"}},
            "across their ends; set optimizer.type=adamw",
        ),
        ({"layout": {"experts": {"materialise": "all"}}}, "fewest_bytes"),
        ({"engine": "ddp", "layout": {"dp_shard": 2}}, "engine=ddp keeps whole ones; type engine=fsdp"),
        ({"engine": {"type": "deepspeed"}, "layout": {"dp_shard": 2}}, "which shards over all ranks; remove it"),
        (
            {"engine": {"type": "fsdp", "shard_size": 4}, "layout": {"dp_shard": 2}},
            "the same number of ranks; keep one",
        ),
    ],
)
def test_refusals(sections: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        recipe(**sections)
