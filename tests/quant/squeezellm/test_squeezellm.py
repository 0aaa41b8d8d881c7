"""Weighted k-means beside Lloyd's iterations in plain loops, and sensitivities beside one backward a row."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from leanmill.core.registry import parse_pass
from leanmill.quant.clusters import nearest, weighted_levels
from leanmill.trainer.passes.run import compress
from tests.sparse.minitron.test_minitron import rows_of, save
from tests.trainer.passes.test_run import recipe, text, tokenizer  # noqa: F401  (fixtures)


def draw(num_rows, num_values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_rows, num_values, generator=generator)
    return values, torch.rand(num_rows, num_values, generator=generator) ** 4


def lloyd(values, mass, levels, iterations):
    """One row, as it is written in textbooks."""
    for _ in range(iterations):
        clusters = [[] for _ in levels]
        for value, count in zip(values, mass, strict=True):
            clusters[min(range(len(levels)), key=lambda k: abs(value - levels[k]))].append((value, count))
        for k, cluster in enumerate(clusters):
            if total := sum(count for _, count in cluster):
                levels[k] = sum(value * count for value, count in cluster) / total
    return levels


@pytest.mark.parametrize("num_levels", [2, 4, 8])
def test_levels_are_those_of_weighted_k_means(num_levels):
    values, mass = draw(5, 40)
    started = weighted_levels(values, mass, num_levels, 0)
    got = weighted_levels(values, mass, num_levels, 200)
    for row in range(5):
        want = lloyd(values[row].tolist(), mass[row].tolist(), started[row].tolist(), 200)
        torch.testing.assert_close(got[row], torch.tensor(want), rtol=1e-5, atol=1e-6)

    def error(levels):
        return (mass * (values - nearest(values, levels)).square()).sum(1)

    assert (error(got) <= error(started) + 1e-9).all()
    even = values.amin(1, keepdim=True) + torch.linspace(0, 1, num_levels) * (values.amax(1) - values.amin(1))[:, None]
    assert error(got).sum() < 0.7 * error(even).sum()


def test_levels_of_weights_that_hardly_count_stay_among_them():
    """Sums of what counts a quadrillion times as much leave only rounding of them."""
    values, mass = torch.tensor([[3.3, 5.0]], dtype=torch.float64), torch.tensor([[1.0, 3e-16]], dtype=torch.float64)
    levels = weighted_levels(values, mass, 2, 5)
    assert levels[0].tolist() == pytest.approx([3.3, 5.0])


def test_rows_that_say_nothing():
    values, mass = draw(3, 10)
    values[0], mass[1] = 0.0, 0.0
    values[2, :9] = 1.0
    levels = weighted_levels(values, mass, 4, 20)
    assert torch.isfinite(levels).all()
    assert not nearest(values, levels)[0].any()
    assert torch.equal(levels[1], weighted_levels(values, torch.ones_like(mass), 4, 20)[1])
    torch.testing.assert_close(nearest(values, levels)[2], values[2])


def test_what_stays_is_no_level():
    values, mass = draw(8, 50)
    options = {"weight_bits": 1, "outlier_share": 0.01, "sensitive_share": 0.02}
    weight = parse_pass({"type": "squeezellm", **options}).solver().solve(values.clone(), mass).weight
    stays = torch.zeros(400, dtype=torch.bool)
    stays[values.abs().flatten().topk(4).indices] = True
    stays[mass.flatten().topk(8).indices] = True
    stays = stays.view(8, 50)
    assert torch.equal(weight[stays], values[stays])
    levels = weighted_levels(values, mass * ~stays, 2, 50)
    assert torch.equal(weight[~stays], nearest(values, levels)[~stays])


def test_weights_count_by_their_squared_gradients(text, tokenizer, tmp_path):  # noqa: F811
    model = save(tmp_path / "in", tokenizer, dtype=torch.float32, num_hidden_layers=2)
    options = {"type": "squeezellm", "weight_bits": 2, "targets": ["mlp.*", "q_proj"]}
    config = recipe(tmp_path / "in", text, tmp_path, options)
    compress(config, tmp_path / "out")
    rows = rows_of(config, tokenizer)
    name = "model.layers.1.mlp.down_proj"
    weight = model.get_submodule(name).weight
    squares = torch.zeros_like(weight)
    for ids, positions in zip(rows["input_ids"], rows["position_ids"], strict=True):
        logits = model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0]
        squares += torch.autograd.grad(F.cross_entropy(logits[:-1], ids[1:]), weight)[0].square()
    want = parse_pass(options).solver().solve(weight.detach().clone(), squares / 8).weight
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # A weight in the middle between two levels may take either.
    assert torch.isclose(after.get_submodule(name).weight, want, rtol=1e-4, atol=1e-5).float().mean() > 0.98
    assert torch.equal(after.model.layers[0].self_attn.k_proj.weight, model.model.layers[0].self_attn.k_proj.weight)
