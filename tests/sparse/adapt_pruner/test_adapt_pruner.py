"""Budgets and importances by Adapt-Pruner's formulas, and the written model beside the masked one."""

import pytest
import torch
from torch.nn import functional as F

from leanmill.sparse.adapt_pruner.surgeon import sparsities
from leanmill.trainer.passes.run import compress
from tests.sparse.minitron.test_minitron import best, load, rows_of, save, seen
from tests.trainer.passes.test_run import recipe, text, tokenizer  # noqa: F401  (fixtures)


def test_shares_follow_importance_between_minus_one_and_one():
    assert sparsities([0.1, 0.3, 0.5], 0.05, 0.02) == pytest.approx([0.07, 0.05, 0.03])
    assert sparsities([0.0, 1.0, 0.5], 0.05, 0.2) == pytest.approx([0.25, 0.0, 0.05])
    assert sparsities([0.2, 0.2], 0.5, 0.3) == pytest.approx([0.5, 0.5])


def saliences(model, rows):
    """|w dL/dw| of every weight, L the mean loss over tokens."""
    logits = model(**rows, use_cache=False).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), rows["input_ids"][:, 1:].flatten()).backward()
    return {name: (p * p.grad).abs().detach() for name, p in model.named_parameters()}


def test_the_written_model_is_the_masked_one(text, tokenizer, tmp_path):  # noqa: F811
    model = save(tmp_path / "in", tokenizer, dtype=torch.float32)
    options = {"type": "adapt_pruner", "sparsity": 0.3, "amplitude": 0.2, "multiple_of": 1}
    config = recipe(tmp_path / "in", text, tmp_path, options)
    compress(config, tmp_path / "out")
    small, rows = load(tmp_path / "out"), rows_of(config, tokenizer)
    acts, found = seen(model, rows), saliences(model, rows)
    influence = [
        float((1 - F.cosine_similarity(*(x.float() for x in acts[f"model.layers.{i}"]), dim=-1)).double().sum())
        for i in range(4)
    ]
    shares = sparsities(influence, 0.3, 0.2)
    neurons, groups = small.config.intermediate_size_by_layer, small.config.num_key_value_heads_by_layer
    assert sum(neurons) == round(4 * 56 * 0.7)
    assert sum(groups) == round(4 * 3 * 0.7)
    assert small.config.num_attention_heads_by_layer == [2 * number for number in groups]
    assert len(set(neurons)) > 1
    for number, share in zip(neurons, shares, strict=True):
        assert abs(number - 56 * (1 - share)) < 1
    for i, layer in enumerate(model.model.layers):
        of = {name.removeprefix(f"model.layers.{i}."): s for name, s in found.items() if f"layers.{i}." in name}
        up, gate, down = (of[f"mlp.{name}_proj.weight"] for name in ("up", "gate", "down"))
        neuron = up.sum(1) + gate.sum(1) + down.sum(0)
        q, k, v, o = (of[f"self_attn.{name}_proj.weight"] for name in "qkvo")
        group = (q.sum(1) + o.sum(0)).view(3, 16).sum(1) + (k.sum(1) + v.sum(1)).view(3, 8).sum(1)
        for module, scores, number, width in (
            (layer.mlp.down_proj, neuron, neurons[i], 1),
            (layer.self_attn.o_proj, group, groups[i], 16),
        ):
            mask = torch.zeros(len(scores))
            mask[best(scores, number)] = 1
            mask = mask.repeat_interleave(width)
            module.register_forward_pre_hook(lambda _, x, mask=mask: (x[0] * mask,))
    with torch.no_grad():
        want, got = model(**rows, use_cache=False).logits, small.float()(**rows, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
