"""What neighbouring blocks share, against the model of copies, and passes behind it."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from leanmill.core.errors import RunError
from leanmill.core.registry import parse_pass
from leanmill.models.config import ModelConfig
from leanmill.trainer.passes.foresight import after_passes
from leanmill.trainer.passes.run import compress
from tests.sparse.minitron.test_minitron import SIZES, rows_of, save
from tests.trainer.passes.test_run import recipe, text, tokenizer  # noqa: F401  (fixtures)


def logits(model, rows):
    with torch.no_grad():
        return model.eval()(**rows, use_cache=False).logits


@pytest.mark.parametrize(
    ("family", "weights", "options", "groups"),
    [
        ("qwen2", "mean", {"group_size": 2, "first_layer": 1}, [[0], [1, 2], [3]]),
        ("qwen3", "first", {"group_size": [1, 3]}, [[0], [1, 2, 3]]),
    ],
)
def test_a_folded_model_is_that_of_copies(family, weights, options, groups, text, tokenizer, tmp_path):  # noqa: F811
    model = save(tmp_path / "in", tokenizer, family, dtype=torch.float32)
    config = recipe(tmp_path / "in", text, tmp_path, {"type": "share_blocks", "weights": weights, **options})
    (report,) = compress(config, tmp_path / "out")
    assert f"{len(groups)} blocks" in str(report)
    layers = model.model.layers
    with torch.no_grad():
        for group in groups:
            for name, first in layers[group[0]].named_parameters():
                if "layernorm" not in name:
                    own = [layers[layer].get_parameter(name) for layer in group]
                    value = torch.stack(own).mean(0) if weights == "mean" else first.clone()
                    for parameter in own:
                        parameter.copy_(value)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(small.model.layers) == len(groups)
    rows = rows_of(config, tokenizer)
    torch.testing.assert_close(logits(small, rows), logits(model, rows), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "weights"), [("qwen2", "mean"), ("qwen3", "first")])
def test_adapters_give_back_what_sharing_took(family, weights, text, tokenizer, tmp_path):  # noqa: F811
    model = save(tmp_path / "in", tokenizer, family, dtype=torch.float32)
    sharing = {"type": "share_blocks", "weights": weights, "group_size": [1, 3]}
    config = recipe(tmp_path / "in", text, tmp_path, {**sharing, "adapter_rank": 1000})
    (report,) = compress(config, tmp_path / "whole")
    assert "adapters of rank 1000" in str(report)
    rows = rows_of(config, tokenizer)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(whole, rows), logits(model, rows), rtol=1e-4, atol=1e-4)
    compress(recipe(tmp_path / "in", text, tmp_path, {**sharing, "adapter_rank": 2}), tmp_path / "cut")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert small.config.adapter_rank == 2
    cut = small.model.layers[1]
    theirs = [layer.mlp.up_proj.weight for layer in model.model.layers[1:]]
    shared = sum(theirs) / 3 if weights == "mean" else theirs[0]
    torch.testing.assert_close(cut.mlp.up_proj.weight, shared)
    for own, weight in zip(cut.own, theirs, strict=True):
        left, values, right = torch.linalg.svd(weight - shared)
        best = (left[:, :2] * values[:2]) @ right[:2]
        adapter = own["up_proj"]
        torch.testing.assert_close(adapter.up @ adapter.down, best, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(adapter.up.norm(dim=0), values[:2], rtol=1e-3, atol=1e-4)  # B = U Sigma


def test_dropped_shared_and_pruned_in_one_recipe(text, tokenizer, tmp_path):  # noqa: F811
    save(tmp_path / "in", tokenizer, dtype=torch.float32)
    passes = [
        {"type": "drop_blocks", "dropped": 1},
        {"type": "share_blocks", "group_size": 3},
        {"type": "wanda", "num_kept": 2, "group_size": 4},
    ]
    compress(recipe(tmp_path / "in", text, tmp_path, *passes), tmp_path / "out")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (small.config.num_hidden_layers, small.config.num_layers_by_block) == (3, [3])
    weight = small.model.layers[0].mlp.up_proj.weight
    assert weight.ne(0).view(-1, 4).sum(1).eq(2).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": [2, 3]}, "add up to 4"),
        ({"group_size": [1, 1, 1, 1]}, "no two blocks share"),
        ({"group_size": [2, 2], "first_layer": 1}, "a list says it all"),
        ({"group_size": 2, "first_layer": 2, "last_layers": 1}, "leave 1 that may share"),
        ({"group_size": 1}, "greater than or equal to 2"),
    ],
)
def test_requests_that_do_not_fit(options, message):
    config = ModelConfig(config={"model_type": "llama", **SIZES})
    with pytest.raises(ValueError, match=message):
        after_passes(config, [parse_pass({"type": "share_blocks", **options})], seed=0)


def test_it_folds_plain_families_only():
    sharing = {"type": "share_blocks", "group_size": 2}
    config = ModelConfig(config={"model_type": "llama", **SIZES})
    with pytest.raises(ValueError, match="'folded_llama' is none of them"):
        after_passes(config, [parse_pass(sharing), parse_pass(sharing)], seed=0)
    gemma = ModelConfig(config={"model_type": "gemma", **SIZES})
    with pytest.raises(ValueError, match="'gemma' is none of them"):
        after_passes(gemma, [parse_pass(sharing)], seed=0)


def test_a_pass_that_is_written_out_is_read_again():
    config = parse_pass({"type": "share_blocks", "group_size": [1, 2, 1]})
    assert parse_pass(config.model_dump(mode="json")) == config


def test_weights_that_are_no_numbers_are_refused(text, tokenizer, tmp_path):  # noqa: F811
    model = save(tmp_path / "in", tokenizer, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "in")
    config = recipe(tmp_path / "in", text, tmp_path, {"type": "share_blocks", "group_size": 2, "weights": "mean"})
    with pytest.raises(RunError, match="mlp.up_proj.weight of block 1 holds what is not finite"):
        compress(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
