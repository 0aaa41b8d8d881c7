"""Budgets and scores by CFSP's formulas, and the written model beside the masked one."""

import math

import pytest
import torch

from leanmill.core.registry import parse_pass
from leanmill.models.config import ModelConfig
from leanmill.sparse.cfsp.surgeon import kept_shares
from leanmill.trainer.passes.foresight import after_passes
from leanmill.trainer.passes.run import compress
from tests.sparse.minitron.test_minitron import SIZES, best, load, rows_of, save, seen
from tests.trainer.passes.test_run import recipe, text, tokenizer  # noqa: F401  (fixtures)


def test_shares_are_sigmoids_of_importance_and_never_more_than_there_is():
    importance = [0.1, 0.2, 0.4]
    sigmoid = [1 / (1 + math.exp(-3 * (value - 0.7 / 3))) for value in importance]
    got = kept_shares(importance, 0.5, 3.0)
    assert got == pytest.approx([0.5 * value / (sum(sigmoid) / 3) for value in sigmoid])
    steep = kept_shares(importance, 0.2, 100.0)
    assert sum(steep) / 3 == pytest.approx(0.8)
    # The largest stays a little below all: avg + (max - avg) / (max - avg) x avg x (1 / 0.8 - 1) / 1.05.
    assert max(steep) == pytest.approx(0.8 * (1 + 0.25 / 1.05))
    assert kept_shares([0.3, 0.3], 0.25, 26.0) == pytest.approx([0.75, 0.75])
    assert kept_shares([0.0, 1.0], 0.75, 1e6) == pytest.approx([0.0, 0.5])


@torch.no_grad()
def scores_by_hand(layer, x):
    """Sum over the three matrices of a neuron's share among all neurons, a row or column at a time, x its norm."""
    norm = x.flatten(0, -2).square().mean(0).sqrt()
    gate, up, down = (getattr(layer.mlp, f"{name}_proj").weight.abs() for name in ("gate", "up", "down"))
    found = torch.zeros(56, dtype=torch.float64)
    for k in range(48):
        found += gate[:, k] / gate[:, k].sum() / 48
        found += up[:, k] / up[:, k].sum() / 48
        weighted = down[k] * norm
        found += weighted / weighted.sum() / 48
    return found * norm


def test_the_written_model_is_the_masked_one(text, tokenizer, tmp_path):  # noqa: F811
    model = save(tmp_path / "in", tokenizer)
    options = {"type": "cfsp", "sparsity": 0.5, "steepness": 8.0, "multiple_of": 1}
    config = recipe(tmp_path / "in", text, tmp_path, options)
    (report,) = compress(config, tmp_path / "out")
    assert "224 neurons cut to 112" in str(report)
    small, rows = load(tmp_path / "out"), rows_of(config, tokenizer)
    acts, angles = seen(model, rows), []
    for index in range(4):
        before, after = acts[f"model.layers.{index}"]
        cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
        angles.append(float((cosine.clamp(-1, 1).arccos() / math.pi).mean()))
    numbers = small.config.intermediate_size_by_layer
    for number, share in zip(numbers, kept_shares(angles, 0.5, 8.0), strict=True):
        assert abs(number - 56 * share) < 1
    assert len(set(numbers)) > 1
    for index, layer in enumerate(model.model.layers):
        kept = best(scores_by_hand(layer, acts[f"model.layers.{index}.mlp.down_proj"][0]), numbers[index])
        mask = torch.zeros(56, dtype=torch.float64)
        mask[kept] = 1
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, x, mask=mask: (x[0] * mask,))
    with torch.no_grad():
        want, got = model(**rows, use_cache=False).logits, small(**rows, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_pass_follows_on_what_another_left_and_blocks_of_one_budget_stay_llama(text, tokenizer, tmp_path):  # noqa: F811
    save(tmp_path / "in", tokenizer, dtype=torch.bfloat16, num_hidden_layers=3)
    once = {"type": "cfsp", "sparsity": 0.25, "steepness": 40.0, "multiple_of": 4}
    config = recipe(tmp_path / "in", text, tmp_path, once, once)
    first, second = compress(config, tmp_path / "out")
    assert "168 neurons cut to 124" in str(first)  # the last multiple of 4 in 126
    assert "124 neurons cut to 92" in str(second)
    even = recipe(tmp_path / "in", text, tmp_path, once | {"steepness": 0.0, "multiple_of": 7})
    compress(even, tmp_path / "even")
    assert load(tmp_path / "even").config.model_type == "llama"


def test_what_does_not_fit_and_what_is_foreseen():
    config = ModelConfig(config={"model_type": "mixtral", **SIZES})
    with pytest.raises(ValueError, match="none of them; give a model"):
        after_passes(config, [parse_pass({"type": "cfsp", "sparsity": 0.5})], seed=0)
    config = ModelConfig(config={"model_type": "llama", **SIZES})
    foreseen = after_passes(config, [parse_pass({"type": "cfsp", "sparsity": 0.5})] * 2, seed=0).config
    assert foreseen["intermediate_size_by_layer"] == [8] * 4
