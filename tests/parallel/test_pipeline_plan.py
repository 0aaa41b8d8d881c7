"""Which blocks are on which stage, what travels, and what is refused before anything is built."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from leanmill.parallel.pipeline_plan import balanced, idle_share, pipeline_problems, rank_of_stage, stages_per_rank
from leanmill.recipe.explain import explain
from leanmill.recipe.root import Recipe


RAW: dict[str, Any] = {
    "model": {"config": {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4}},
    "engine": "ddp",
    "layout": {"pp": 2},
    "train": {"steps": 3},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "single"}, "layout.pp=2 shares blocks among ranks, and engine=single is one"),
        ({"engine": "deepspeed"}, "layout.pp=2 is for engines on torch alone"),
        ({"train": {"steps": 3, "compile": True}}, "set train.compile=false"),
        ({"layout": {"pp": 2, "tp": 2}}, "has not been shown to hold beside layout.tp=2"),
        ({"layout": {"pp": 2, "cp": 2}}, "has not been shown to hold beside layout.cp=2"),
        ({"layout": {"pp": 2, "ep": 2}}, "does not go together with experts that ranks share"),
        ({"layout": {"pp_schedule": "zbv"}}, "layout.pp_schedule is about ranks that each have some blocks"),
        ({"layout": {"pp_split": [0, 2]}}, "layout.pp_split is about ranks that each have some blocks"),
        ({"layout": {"pp": 2, "pp_split": [0, 4]}}, "begins a stage with block 4, and blocks are 0 to 3"),
        ({"layout": {"pp": 2, "pp_split": [1, 2]}}, "begins with 0 and rises"),
        ({"layout": {"pp": 2, "pp_split": [0, 1, 2]}}, "makes 3 stages"),
        ({"layout": {"pp": 4, "pp_schedule": "zbv"}}, "makes 8 stages, and the model has 4 blocks"),
        ({"engine": "fsdp", "layout": {"pp": 2, "pp_schedule": "zbv"}}, "takes backward apart"),
        ({"engine": {"type": "fsdp", "cpu_offload": True}}, "engine.cpu_offload keeps them on the host"),
        (
            {
                "layout": {"pp": 2, "pp_schedule": "zbv"},
                "train": {"steps": 3, "activation_checkpointing": "selective"},
            },
            "goes back through a block twice",
        ),
        ({"techniques": [{"type": "rigl"}]}, "rigl has not been shown to hold where ranks share out blocks"),
        ({"techniques": [{"type": "lora", "dropout": 0.1, "where": "branch"}]}, "lora has not been shown to hold"),
        ({"techniques": [{"type": "nm_sparsity", "log_flips": True}]}, "nm_sparsity has not been shown to hold"),
        ({"model": {"config": {"model_type": "gpt2"}}}, "has not been shown to hold for model type 'gpt2'"),
        ({"model": {"config": {"model_type": "phi3", "resid_pdrop": 0.1}}}, "resid_pdrop=0.1; set it to 0"),
    ],
)
def test_a_recipe_says_what_does_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate({**RAW, **changes})


@pytest.mark.parametrize(
    ("schedule", "number", "message"),
    [
        ("1f1b", 3, "needs 4 micro-batches or more, and a step has 3"),
        ("zbv", 3, "needs 4 micro-batches or more"),
        ("interleaved_1f1b", 9, "as many in each, and a step has 9"),
        ("interleaved_1f1b", 8, None),
        ("gpipe", 1, None),
        ("1f1b", 4, None),
    ],
)
def test_schedules_ask_for_micro_batches(schedule: Any, number: int, message: str | None) -> None:
    problems = list(pipeline_problems({}, 4, schedule, None, number))
    assert (not problems) if message is None else (message in problems[0])


@pytest.mark.parametrize("num_stages", [1, 2, 3, 6])
def test_the_largest_stage_is_as_small_as_can_be(num_stages: int) -> None:
    blocks, before, behind = [5, 3, 8, 1, 1, 9], 7, 12

    def largest(firsts: tuple[int, ...]) -> int:
        sizes = [sum(blocks[a:b]) for a, b in zip(firsts, [*firsts[1:], len(blocks)], strict=True)]
        sizes[0] += before
        sizes[-1] += behind
        return max(sizes)

    ways = [(0, *rest) for rest in combinations(range(1, len(blocks)), num_stages - 1)]
    assert largest(tuple(balanced(blocks, before, behind, num_stages))) == min(map(largest, ways))


def test_stages_lie_on_ranks() -> None:
    assert [rank_of_stage(stage, 3, "zbv") for stage in range(6)] == [0, 1, 2, 2, 1, 0]
    assert [rank_of_stage(stage, 3, "interleaved_1f1b") for stage in range(6)] == [0, 1, 2, 0, 1, 2]
    assert stages_per_rank("interleaved_1f1b", 2, (0, 1, 2, 3, 4, 5)) == 3
    assert idle_share("1f1b", 4, 12) == 3 / 15
    assert idle_share("interleaved_1f1b", 4, 12, of_rank=3) == 1 / 13


def test_a_recipe_says_what_travels() -> None:
    recipe = Recipe.model_validate({**RAW, "batch": {"tokens_per_step": 4096, "tokens_per_micro_batch": 1024}})
    assert f"{2 * 1024 * 32} numbers travel for each micro-batch" in str(explain(recipe))
