from __future__ import annotations

import pytest
import torch
from torch import nn

from leanmill.core.blocks import decoder_blocks
from tests.parallel import cases


def test_finds_the_layers_of_a_causal_lm() -> None:
    model = cases.make_module().model
    assert decoder_blocks(model) == list(model.model.layers)


def test_a_list_of_experts_inside_a_layer_is_no_block() -> None:
    def layer(size: int) -> nn.Module:
        block = nn.Module()
        block.experts = nn.ModuleList(nn.Linear(size, size) for _ in range(4))
        return block

    model = nn.Module()
    model.body = nn.Module()
    model.body.layers = nn.ModuleList(layer(3) for _ in range(2))
    model.heads = nn.ModuleList([nn.Linear(2, 2)])
    assert decoder_blocks(model) == list(model.body.layers)


def test_none_where_nothing_repeats() -> None:
    assert decoder_blocks(nn.Linear(2, 2)) == []


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gpt_neox"])
def test_finds_the_layers_of_other_families(family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 50}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    blocks = decoder_blocks(model)
    assert len(blocks) == 3
    assert len({type(block) for block in blocks}) == 1
