"""A recipe says the dropout of a model, whatever the family calls it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig

from leanmill.core.errors import ConfigError
from leanmill.models.build import build_on_meta
from leanmill.models.config import ModelConfig
from leanmill.models.dropout import set_dropout


SIZES = {"vocab_size": 31, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}


def shares(model):
    return {module.p for module in model.modules() if isinstance(module, nn.Dropout)}


@pytest.mark.parametrize(("given", "expected"), [(None, 0.1), (0.0, 0.0), (0.25, 0.25)])
def test_every_dropout_of_a_checkpoint(given, expected, tmp_path):
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**SIZES, bos_token_id=None, eos_token_id=None)).save_pretrained(tmp_path)
    model = build_on_meta(ModelConfig(path=str(tmp_path), dropout=given))
    assert shares(model) == {expected}
    assert model.config.attn_pdrop == expected


def test_every_dropout_of_a_new_model():
    config = {"model_type": "opt", "hidden_size": 8, "ffn_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = build_on_meta(ModelConfig(config=config | {"vocab_size": 31, "word_embed_proj_dim": 8}, dropout=0.0))
    assert model.config.dropout == model.config.attention_dropout == 0.0
    assert not any(layer.dropout for layer in model.model.decoder.layers)


def test_a_family_without_dropout():
    with pytest.raises(ConfigError, match="the family mamba has no dropout; remove"):
        set_dropout(MambaConfig(), 0.1)
    set_dropout(MambaConfig(), 0.0)
