"""Continuing a prompt with an exported folder."""

import json

import pytest
import torch

from leanmill.cli.main import main
from leanmill.core.errors import ConfigError
from leanmill.export import export_model
from leanmill.export.generation import Continuation, generate, open_model, open_tokenizer, plain_bf16, prompt_ids
from tests.export.checkpoints import checkpoint_of


PROMPT = torch.tensor([5, 7, 11, 3])


@pytest.fixture
def folder(tmp_path):
    technique = {"type": "int_quant", "weight_bits": 4, "targets": ["*_proj", "embed_tokens", "lm_head"]}
    checkpoint = checkpoint_of(tmp_path / "run", "llama", [technique])[1]
    _give_tokenizer(tmp_path / "run/tokenizer")
    export_model(checkpoint, tmp_path / "out", packing="int4")
    return tmp_path / "out"


def _give_tokenizer(path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet[:97])}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(path)


def test_the_cache_gives_the_tokens_of_whole_forwards(folder):
    model = open_model(folder)
    one = Continuation(model, PROMPT)
    generate([one], max_new_tokens=9, stops=frozenset())
    ids = PROMPT.view(1, -1)
    for _ in range(9):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert one.generated.token_ids == ids[0, 4:].tolist()
    assert len(one.generated.seconds) == 8
    assert one.generated.tokens_per_second > 0


def test_draws_follow_the_seed_and_stops_end_each_by_itself(folder):
    model = open_model(folder)

    def drawn(seed, stops=frozenset()):
        one = Continuation(model, PROMPT, temperature=2.0, seed=seed)
        generate([one], max_new_tokens=8, stops=stops)
        return one.generated.token_ids

    assert drawn(1) == drawn(1) != drawn(2)
    third = drawn(1)[2]
    assert drawn(1, frozenset([third])) == drawn(1)[: drawn(1).index(third) + 1]


def test_the_bf16_model_has_the_same_weights_and_one_table(folder):
    packed, plain = open_model(folder), plain_bf16(folder)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    layer = "model.layers.1.mlp.down_proj"
    values = packed.get_submodule(layer).weight_values()
    assert torch.equal(plain.get_submodule(layer).weight, values.bfloat16())
    with torch.no_grad():
        found, expected = (model(PROMPT.view(1, -1)).logits.float() for model in (plain, packed))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_the_command(folder, capsys):
    arguments = ["generate", "--model", str(folder), "--prompt", "#5*", "--max-new-tokens", "5"]
    assert main([*arguments, "--beside-bf16"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("#5*")
    assert "as exported: 5 tokens" in out
    assert "in bf16: 5 tokens" in out
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["as exported"]["num_tokens"] == 5
    assert main([*arguments[:4], "", *arguments[5:]]) == 2
    assert "the prompt is empty" in capsys.readouterr().err
    assert main([*arguments[:-1], "62"]) == 2
    assert "leaves no room" in capsys.readouterr().err
    assert main([*arguments, "--weights-gib", "1"]) == 2
    assert "packed weights, which stay in memory" in capsys.readouterr().err
    assert main([*arguments, "--weights-gib", "1", "--beside-bf16"]) == 2
    assert "holds both models whole" in capsys.readouterr().err


def test_what_is_no_exported_model_is_refused(tmp_path, folder):
    with pytest.raises(ConfigError, match="no such folder"):
        open_model(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="type first leanmill export"):
        open_model(tmp_path / "run")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        open_tokenizer(folder)
    tokenizer = type("T", (), {"__call__": lambda self, text: {"input_ids": []}})()
    with pytest.raises(ConfigError, match="empty"):
        prompt_ids(tokenizer, "", room=None)
