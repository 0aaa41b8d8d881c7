"""What is refused beside rows that ranks share, before anything is built."""

from __future__ import annotations

from typing import Any

import pytest

from leanmill.recipe.explain import explain
from leanmill.recipe.root import Recipe


RAW: dict[str, Any] = {
    "model": {"config": {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 1}},
    "engine": "ddp",
    "layout": {"cp": 2},
    "train": {"steps": 3},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "single"}, "layout.cp=2 shares rows among ranks, and engine=single is one"),
        ({"engine": "deepspeed"}, "layout.cp=2 is for engines on torch alone"),
        ({"train": {"steps": 3, "compile": True}}, "set train.compile=false"),
        (
            {"layout": {"cp": 2, "tp": 2, "cp_rows": "by_document"}},
            "layout.cp_rows=by_document has not been shown to hold beside layout.tp=2",
        ),
        (
            {
                "layout": {"cp": 4, "tp": 2},
                "model": {"config": {"model_type": "llama", "num_attention_heads": 4}},
            },
            r"layout.cp=4 does not divide model.config.num_attention_heads=4 / layout.tp=2; set layout.cp=2",
        ),
        ({"layout": {"cp": 2, "ep": 2}}, "does not go together with experts that ranks share"),
        ({"layout": {"cp_attention": "all_gather"}}, "is about rows that ranks share; set layout.cp, or remove it"),
        ({"layout": {"cp": 3, "cp_attention": "all_gather"}}, "layout.cp=3 does not divide data.sequence_length="),
        ({"layout": {"cp": 8}}, "num_attention_heads=4; set layout.cp=4, or layout.cp_attention=all_gather"),
        ({"techniques": [{"type": "rigl"}]}, "rigl has not been shown to hold where ranks share rows"),
        ({"techniques": [{"type": "neftune"}]}, "neftune has not been shown to hold where ranks share rows"),
        ({"model": {"config": {"model_type": "gpt2"}}}, "has not been shown to hold for model type 'gpt2'"),
        ({"model": {"config": {"model_type": "llama", "attention_dropout": 0.1}}}, "attention_dropout=0"),
        (
            {"model": {"config": {"model_type": "phi3", "resid_pdrop": 0.1}}},
            "same places of their parts by model.config",
        ),
        ({"model": {**RAW["model"], "attention": "flex_attention"}}, "has an attention of its own"),
    ],
)
def test_a_recipe_says_what_does_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate({**RAW, **changes})


def test_a_recipe_says_what_travels() -> None:
    recipe = Recipe.model_validate(RAW)
    assert "each sends 48 numbers a layer for each of its tokens" in str(explain(recipe))
