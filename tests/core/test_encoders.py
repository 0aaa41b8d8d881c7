"""Packed rows of encoders: what a text computes does not depend on what lies beside it, in every family."""

import pytest
import torch

from leanmill.core.encoders import encoder_inputs, first_position, is_encoder
from leanmill.core.errors import ConfigError
from leanmill.models.build import build_on_meta
from leanmill.models.config import ModelConfig
from leanmill.models.materialise import make_materialiser
from tests.models.families import ENCODERS, tiny_config, tiny_encoder


LENGTHS = (7, 10, 5)
"""Of the texts of a row and of its padding."""


def built(family, attention="auto"):
    config = ModelConfig(task="masked_lm", config=tiny_encoder(family), attention=attention)
    model = build_on_meta(config, sequence_length=64, device_type="cpu")
    make_materialiser(config, seed=0)(model)
    return model.eval()


def packed():
    total = sum(LENGTHS)
    ids = torch.randint(2, 97, (2, total), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(n) for n in LENGTHS[:1]] + [torch.arange(LENGTHS[1] + LENGTHS[2])])
    is_token = torch.arange(total) < sum(LENGTHS[:2])
    ids = ids.masked_fill(~is_token, 1)
    return {"input_ids": ids, "position_ids": positions.expand(2, -1), "token_mask": is_token.expand(2, -1)}


@torch.no_grad()
def logits(model, batch):
    return model(**encoder_inputs(model, batch)).logits


@pytest.mark.parametrize(
    ("family", "attention"), [(family, "auto") for family in ENCODERS] + [("bert", "eager"), ("modernbert", "eager")]
)
def test_a_text_in_a_packed_row_computes_what_it_does_alone(family, attention):
    model, batch = built(family, attention), packed()
    found = logits(model, batch)
    assert found.isfinite().all()
    for first, last in ((0, 7), (7, 17)):
        ids = batch["input_ids"][:, first:last]
        with torch.no_grad():
            alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits  # as transformers does by itself
        torch.testing.assert_close(found[:, first:last], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ENCODERS)
def test_a_token_sees_what_follows_it(family):
    model, batch = built(family), packed()
    changed = batch | {"input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, 2] = (changed["input_ids"][:, 2] - 1) % 95 + 2
    moved = (logits(model, changed) - logits(model, batch)).abs().amax((0, 2)) > 1e-6
    assert moved[:2].all()
    assert not moved[7:].any()


def test_encoders_are_told_from_causal_models():
    causal = build_on_meta(ModelConfig(config=tiny_config("llama")), device_type="cpu")
    causal_bert = build_on_meta(ModelConfig(config=tiny_encoder("bert") | {"is_decoder": True}), device_type="cpu")
    assert [is_encoder(model) for model in (built("bert"), causal, causal_bert, torch.nn.Linear(2, 2))] == [
        True,
        False,
        False,
        False,
    ]


def test_a_family_with_masks_of_its_own_is_refused():
    config = {**tiny_encoder("bert"), "model_type": "deberta-v2"}
    with pytest.raises(ConfigError, match="'deberta-v2' makes attention masks in a way of its own"):
        build_on_meta(ModelConfig(task="masked_lm", config=config), device_type="cpu")


def test_positions_begin_where_the_family_begins_them():
    assert {family: first_position(built(family)) for family in ENCODERS} == {
        "bert": 0,
        "roberta": 2,
        "mpnet": 2,
        "modernbert": 0,
        "distilbert": 0,
    }
