"""Techniques beside each other, by what they say of themselves."""

import pytest

from leanmill.recipe.root import Recipe


MODEL = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
MODEL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 300}
PAIRS = {
    "model": {"config": MODEL},
    "data": {"source": {"type": "hf", "path": "pairs.jsonl"}, "task": "preference", "sequence_length": 64},
    "batch": {"tokens_per_step": 64, "tokens_per_micro_batch": 64},
    "train": {"steps": 1, "cross_entropy_weight": 0},
}


def test_a_start_that_moves_the_base_leaves_no_reference_without_adapters():
    def recipe(start, **dpo):
        adapters = {"type": "peft", "method": "lora", "init_lora_weights": start}
        return Recipe.model_validate(PAIRS | {"techniques": [{"type": "dpo", **dpo}, adapters]})

    with pytest.raises(ValueError, match="peft moves a part of the model into them at its start; set dpo.reference"):
        recipe("pissa")
    assert recipe(start=True)
    assert recipe("olora", reference="some/model")


def test_adapters_of_an_earlier_phase_are_no_part_of_the_reference():
    def recipe(carry, first, **dpo):
        lora = {"type": "lora"}
        sft = {"techniques": [lora], "data": {"task": "sft"}, "train": {"cross_entropy_weight": 1}}
        pairs = {"techniques": [{"type": "dpo", **dpo}, lora]}
        phases = [{"name": "first", "overrides": sft if first == "sft" else {"techniques": [{"type": "dpo"}, lora]}}]
        phases.append({"name": "second", "carry": carry, "overrides": pairs})
        return Recipe.model_validate(PAIRS | {"techniques": pairs["techniques"], "phases": phases})

    with pytest.raises(ValueError, match=r"phases\.1 \(second\): carry: state .* type carry: weights"):
        recipe("state", "sft")
    assert recipe("auto", "sft")  # folded into the weights, so the reference has them
    assert recipe("state", "sft", reference="some/model")
    assert recipe("state", "dpo")  # the same training, going on
