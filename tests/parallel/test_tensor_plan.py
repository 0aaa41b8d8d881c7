"""What ranks share of a model, and what is refused before anything is built."""

from __future__ import annotations

from typing import Any

import pytest

from leanmill.core.errors import ConfigError
from leanmill.parallel.derived_plan import Underivable, derived_pairs
from leanmill.parallel.tensor_plan import derived_lines, split_dims, tensor_plan
from leanmill.recipe.root import Recipe
from tests.parallel.tensor_cases import model_on_meta


def test_a_plan_has_the_layers_of_the_family_and_the_vocabulary() -> None:
    dims = split_dims(model_on_meta(family="llama"), 2)
    assert {name for name, dim in dims.items() if dim == 1} == {
        f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    assert dims["lm_head.weight"] == dims["model.embed_tokens.weight"] == dims["model.layers.1.mlp.up_proj.bias"] == 0


def test_norms_inside_heads_see_parts_of_their_gradient() -> None:
    partial = [share.name for share in tensor_plan(model_on_meta(family="qwen3"), 2) if share.kind == "partial"]
    assert partial == [f"model.layers.{layer}.self_attn.{name}_norm" for layer in (0, 1) for name in "qk"]


def test_a_vocabulary_that_does_not_divide_stays_whole() -> None:
    names = split_dims(model_on_meta(vocab_size=67), 2)
    assert "model.layers.0.mlp.up_proj.weight" in names
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & names.keys()


def test_fused_projections_are_cut_by_heads_inside_each_of_them() -> None:
    plan = {share.name: share for share in tensor_plan(model_on_meta(family="gpt2"), 2)}
    fused = plan["transformer.h.1.attn.c_attn"]
    assert fused.rows is not None
    # Queries, keys and values of 4 heads of 6, one behind the other.
    assert fused.rows[1] == tuple(part * 24 + row for part in range(3) for row in range(12, 24))
    assert plan["transformer.h.1.attn"].counts == {"split_size": 12}
    assert plan["transformer.h.0.mlp.c_proj"].kind == "columns"
    assert derived_lines(model_on_meta(family="gpt2"), 2)[:3] == [
        "transformer.h.*.attn.c_attn: rows of a rank's heads, 0-11, 24-35, 48-59 on the first; held whole",
        "transformer.h.*.attn.c_proj: by columns",
        "transformer.h.*.attn: split_size 12 on a rank",
    ]


def test_a_head_is_never_cut() -> None:
    with pytest.raises(Underivable, match=r"2 ranks would need the same rows of transformer.h.0.attn.c_attn"):
        derived_pairs(model_on_meta(family="gpt2", num_attention_heads=3), 2)


_GPT = {"n_head": 4, "n_embd": 24, "n_layer": 2, "attn_pdrop": 0.0}


@pytest.mark.parametrize(
    ("family", "sizes", "tp", "message"),
    [
        ("llama", {}, 4, r"does not divide model.config.num_key_value_heads=2; set layout.tp=2"),
        ("llama", {"num_attention_heads": 3, "num_key_value_heads": 3}, 2, r"num_attention_heads=3; set layout.tp=1"),
        ("llama", {"intermediate_size": 41}, 2, r"the 41 outputs of model.layers.0.mlp.gate_proj; set layout.tp=1"),
        ("llama", {"attention_dropout": 0.1}, 2, r"would drop the same places by model.config.attention_dropout=0.1"),
        ("gpt2", {"attn_pdrop": 0.1}, 2, r"would drop the same places by model.config.attn_pdrop=0.1"),
        ("gpt2", {"num_attention_heads": 3}, 2, r"does not divide model.config.num_attention_heads=3"),
        ("gpt_bigcode", _GPT, 2, r"2 ranks would need the same rows of transformer.h.0.attn.c_attn"),
        ("bloom", {"n_head": 4, "n_layer": 2}, 2, r"no count in transformer.h.0.self_attention makes a rank compute"),
        ("doge", {}, 2, r"shares model.layers.0.self_attn.q_proj, and not model.layers.0.self_attn.A beside it"),
        ("mixtral", {}, 2, r"layout.tp=2: model.layers.0.mlp.* would be shared as '.*', which is not known here"),
    ],
)
def test_what_does_not_divide_or_is_not_known_is_refused(
    family: str, sizes: dict[str, Any], tp: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tensor_plan(model_on_meta(family=family, **sizes), tp)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "single"}, "layout.tp=2 shares matmuls among ranks, and engine=single is one"),
        ({"engine": "deepspeed"}, "layout.tp=2 is for engines on torch alone"),
        ({"engine": {"type": "ddp", "staging": "per_step"}}, "set engine.staging=auto"),
        ({"engine": {"type": "fsdp", "gather": "packed"}}, "set engine.gather=full"),
        ({"train": {"steps": 3, "compile": True}}, "set train.compile=false"),
        ({"optimizer": {"type": "adamw8bit"}}, "set optimizer.type=adamw"),
        (
            {"layout": {"tp": 2, "low_comm": {"type": "diloco", "workers": 2}}},
            "low_comm=diloco has not been shown to hold where ranks",
        ),
        ({"layout": {"tp": 2, "ep": 2}}, "does not go together with experts that ranks share"),
        ({"techniques": [{"type": "rigl"}]}, "rigl has not been shown to hold where ranks share matmuls"),
        (
            {"techniques": [{"type": "lora", "where": "branch", "dropout": 0.1}]},
            "lora has not been shown to hold where ranks share matmuls",
        ),
        ({"model": {"config": {"model_type": "llama", "num_attention_heads": 3}}}, "num_attention_heads=3; set"),
    ],
)
def test_a_recipe_says_what_does_not_go_together(changes: dict[str, Any], message: str) -> None:
    raw: dict[str, Any] = {
        "model": {"config": {"model_type": "llama"}},
        "engine": "ddp",
        "layout": {"tp": 2},
        "train": {"steps": 3},
    }
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate({**raw, **changes})
    Recipe.model_validate(raw)
