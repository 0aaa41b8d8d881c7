"""What an encoder cannot be trained with is refused when the recipe is read, in a line that says what to type."""

import pytest

from leanmill.core.registry import TECHNIQUES
from leanmill.recipe.compress import CompressRecipe
from leanmill.recipe.root import Recipe


BERT = {"model_type": "bert"}
MASKED = {"model": {"task": "masked_lm", "config": BERT}, "data": {"task": "masked", "sequence_length": 64}}


def recipe(**changes):
    raw = {"train": {"steps": 1}, **MASKED}
    return Recipe.model_validate({**raw, **{key: {**raw.get(key, {}), **value} for key, value in changes.items()}})


def test_an_encoder_takes_what_changes_weights():
    names = ["nm_sparsity", "ternary", "lora"]
    found = Recipe.model_validate({"train": {"steps": 1}, **MASKED, "techniques": [{"type": name} for name in names]})
    assert found.model.task == "masked_lm"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"task": "causal_lm"}}, "model.task=causal_lm does not learn from data.task=masked; set data.task="),
        ({"data": {"task": "pretrain"}}, "model.task=masked_lm does not learn from data.task=pretrain"),
        (
            {"data": {"task": "pretrain", "masking": {"share": 0.3}}},
            "data.masking hides tokens, and data.task=pretrain",
        ),
        ({"eval": {"prompts": ["a"]}}, "a model of model.task=masked_lm continues nothing"),
        ({"train": {"steps": 1, "logits_chunk_tokens": 8}}, "train.logits_chunk_tokens cuts the head of causal models"),
        ({"model": {"attention": "flex_attention"}}, "set model.attention=sdpa"),
        ({"model": {"moe": {"num_experts": 4, "num_experts_per_token": 2}}}, "model.moe"),
    ],
)
def test_what_is_for_causal_models_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


@pytest.mark.parametrize("name", ["distill", "multi_token", "rho1", "stochastic_depth", "mixture_of_depths", "peft"])
def test_techniques_of_causal_models_are_refused(name):
    required = {"distill": {"teacher": "t"}, "rho1": {"reference": "t"}, "peft": {"method": "vera"}}
    technique = {"type": name, **required.get(name, {})}
    assert name in TECHNIQUES
    with pytest.raises(ValueError, match=f"{name} is about causal language models, and model.task=masked_lm"):
        Recipe.model_validate({"train": {"steps": 1}, **MASKED, "techniques": [technique]})


def test_passes_are_refused():
    raw = {"model": {"task": "masked_lm", "path": "m"}, "passes": [{"type": "magnitude", "sparsity": 0.5}]}
    with pytest.raises(ValueError, match="passes look at causal models"):
        CompressRecipe.model_validate(raw)
    pruned = {"passes": [{"type": "magnitude", "sparsity": 0.5}]}
    phases = [{"name": "train", "overrides": {"train": {"steps": 1}}}, pruned]
    with pytest.raises(ValueError, match=r"phases.1.passes look at causal models"):
        Recipe.model_validate({**MASKED, "phases": phases})


PAIRS = {
    "model": {"task": "embedding", "config": BERT},
    "data": {"task": "sentence_pairs", "source": {"type": "hf", "path": "p.jsonl"}, "sequence_length": 64},
}


def of_pairs(techniques=({"type": "contrastive"},), **changes):
    raw = {"train": {"steps": 1}, **PAIRS, "techniques": list(techniques)}
    return Recipe.model_validate({**raw, **{key: {**raw.get(key, {}), **value} for key, value in changes.items()}})


def test_vectors_take_losses_of_theirs_and_what_changes_weights():
    found = of_pairs([{"type": "embedding_distill", "teacher": "t"}, {"type": "nm_sparsity"}, {"type": "int_quant"}])
    assert found.data.text_length == 32


@pytest.mark.parametrize(
    ("techniques", "changes", "message"),
    [
        ([], {}, "model.task=embedding has no loss of its own; add {type: contrastive}"),
        ([{"type": "nm_sparsity"}], {}, "has no loss of its own"),
        ([{"type": "distill", "teacher": "t"}], {}, "distill is about causal language models"),
        ([{"type": "contrastive"}], {"data": {"source": {"type": "local_corpus"}}}, "needs pairs, and local_corpus"),
        (
            [{"type": "contrastive"}],
            {"data": {"source": {"type": "hf", "path": "p", "streaming": True}}},
            "reads pairs by number, and 'data' is a stream",
        ),
        (
            [{"type": "contrastive"}],
            {"model": {"config": {**BERT, "max_position_embeddings": 16}}},
            "set data.sequence_length=32 or raise",
        ),
        ([{"type": "contrastive"}], {"model": {"task": "masked_lm"}}, "does not learn from data.task=sentence_pairs"),
    ],
)
def test_what_vectors_cannot_be_trained_with_is_refused(techniques, changes, message):
    with pytest.raises(ValueError, match=message):
        of_pairs(techniques, **changes)


def test_losses_of_vectors_and_pooling_are_refused_elsewhere():
    with pytest.raises(
        ValueError,
        match="contrastive is about vectors of texts, and model.task=masked_lm",
    ):
        Recipe.model_validate({"train": {"steps": 1}, **MASKED, "techniques": [{"type": "contrastive"}]})
    with pytest.raises(ValueError, match="model.pooling is of one vector for a text, and model.task=masked_lm"):
        recipe(model={"pooling": "cls"})
