"""OwLore: outliers counted by the definition, layers drawn in proportion, and a run that draws so."""

import itertools
import json
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from leanmill.core.errors import ConfigError, RunError
from leanmill.core.registry import parse_technique
from leanmill.core.sites import Sites
from leanmill.models.config import ModelConfig
from leanmill.models.summary import block_scores
from leanmill.peft_ext.lisa.outliers import outlier_share
from leanmill.peft_ext.lisa.schedule import LayerSampling
from leanmill.trainer.passes.run import compress
from tests.core.tiny import context, tiny
from tests.sparse.minitron.test_minitron import rows_of, save
from tests.trainer.passes.test_run import recipe, text, tokenizer  # noqa: F401  (fixtures)


LAYERS = [f"model.layers.{n}" for n in range(4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_share_is_that_of_the_definition(dtype):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).pow(3).to(dtype).float() for shape in ((300, 7), (5, 9))]
    tokens = [torch.randn(20, weight.shape[1], generator=generator) for weight in weights]
    scores = [
        abs(weight[i, j]) * torch.linalg.vector_norm(x[:, j])
        for weight, x in zip(weights, tokens, strict=True)
        for i in range(weight.shape[0])
        for j in range(weight.shape[1])
    ]
    scores = torch.stack(scores)
    for threshold in (2.0, 13.0):
        expected = float((scores > threshold * scores.mean()).float().mean())
        layers = [(weight, x.square().sum(0)) for weight, x in zip(weights, tokens, strict=True)]
        assert outlier_share(layers, threshold) == pytest.approx(expected, abs=1e-7)


def test_weights_that_are_no_numbers_are_refused():
    weight = torch.ones(3, 4)
    weight[1, 2] = float("nan")
    with pytest.raises(RunError, match="not finite"):
        outlier_share([(weight, torch.ones(4))], 5.0)


def test_layers_are_drawn_in_proportion_one_after_another():
    weights = dict(zip(LAYERS, (0.5, 0.3, 0.15, 0.05), strict=True))
    schedule = LayerSampling(LAYERS, 2, 1, seed=0, weights=weights)
    num_draws = 6000
    counts = Counter(tuple(sorted(schedule.drawn(LAYERS, step))) for step in range(num_draws))
    chi_square = 0.0
    for pair in itertools.combinations(LAYERS, 2):
        # As numpy's choice without replacement: the second in proportion among those that are left.
        p = sum(weights[a] * weights[b] / (1 - weights[a]) for a, b in itertools.permutations(pair))
        chi_square += (counts[pair] - num_draws * p) ** 2 / (num_draws * p)
    assert chi_square < 20.5  # 99.9 % quantile with 5 degrees


def test_equal_weights_draw_as_none_do_and_weights_of_zero_come_last():
    uniform = LayerSampling(LAYERS, 2, 3, seed=1)
    equal = LayerSampling(LAYERS, 2, 3, seed=1, weights=dict.fromkeys(LAYERS, 0.2))
    nothing = LayerSampling(LAYERS, 2, 3, seed=1, weights=dict.fromkeys(LAYERS, 0.0))
    one = LayerSampling(LAYERS, 2, 3, seed=1, weights=dict.fromkeys(LAYERS, 0.0) | {LAYERS[2]: 1e-9})
    for step in range(60):
        assert uniform.drawn(LAYERS, step) == equal.drawn(LAYERS, step) == nothing.drawn(LAYERS, step)
        assert LAYERS[2] in one.drawn(LAYERS, step)
    assert {path for step in range(0, 60, 3) for path in one.drawn(LAYERS, step)} == set(LAYERS)


def test_a_pass_notes_the_shares_and_a_run_draws_by_them(text, tokenizer, tmp_path):  # noqa: F811
    model = save(tmp_path / "in", tokenizer, dtype=torch.float32, num_hidden_layers=2).requires_grad_(False)
    asked = recipe(tmp_path / "in", text, tmp_path, {"type": "outliers", "threshold": 2.0})
    reports = compress(asked, tmp_path / "out")
    before = load_file(tmp_path / "in/model.safetensors")
    after = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        after |= load_file(file)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("model.layers.1."):
            module.register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0]}))
    rows = rows_of(asked, tokenizer)
    model(input_ids=rows["input_ids"], position_ids=rows["position_ids"])
    layers = [(model.get_submodule(name).weight, x.flatten(0, 1).square().sum(0)) for name, x in inputs.items()]
    found = block_scores(ModelConfig(path=str(tmp_path / "out")), "outliers")
    assert found[1] == pytest.approx(outlier_share(layers, 2.0), abs=2e-4)
    assert [report.score for report in reports] == found
    assert json.loads((tmp_path / "out/leanmill.json").read_text())["reports"] == []
    with pytest.raises(ConfigError, match=r"does not say what the pass outliers has found in it; run the pass first"):
        block_scores(ModelConfig(path=str(tmp_path / "in")), "outliers")
    with pytest.raises(ValueError, match="outliers notes how the model is, which a pass behind it changes"):
        recipe(tmp_path / "in", text, tmp_path, {"type": "outliers"}, {"type": "magnitude", "sparsity": 0.5})


def test_the_schedule_has_the_weights_that_were_noted():
    model, lisa = tiny(), parse_technique({"type": "lisa", "num_layers": 1, "draw": "outliers"})
    schedule = lisa.install(Sites(model), context(block_scores=lambda name: [0.25, 0.0])).trainable_schedule
    assert schedule.weights == {"model.layers.0": 0.25, "model.layers.1": 0.0}
    assert schedule.drawn(["model.layers.0", "model.layers.1"], 17) == {"model.layers.0"}
    with pytest.raises(ConfigError, match="tells of 3 layers where the model has 2; run the pass outliers"):
        lisa.install(Sites(model), context(block_scores=lambda name: [1.0, 1.0, 1.0]))
