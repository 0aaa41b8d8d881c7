"""Removal by the paper's equations, the choice by a table, and the written models."""

import json

import pytest
import torch

from leanmill.core.errors import ConfigError
from leanmill.core.registry import parse_pass
from leanmill.sparse.ziplm.latency import measure, read_table
from leanmill.sparse.ziplm.removal import damped, in_turn, refitted
from leanmill.trainer.passes.run import compress
from tests.sparse.minitron.test_minitron import load, rows_of, save, seen
from tests.trainer.passes.test_run import recipe, text, tokenizer  # noqa: F401  (fixtures)


def layer(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mixed = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(50, columns, generator=generator, dtype=torch.float64) @ mixed
    return weight, x.t() @ x


@pytest.mark.parametrize(("columns", "group_size"), [(12, 3), (7, 1)])
def test_groups_go_by_least_squares_and_the_others_make_up_for_them(columns, group_size):
    """Every candidate refitted by lstsq: what goes is what costs least, and costs add up to the error of the refit."""
    weight, gram = layer(5, columns)
    gram = damped(gram, 0.01)
    root = torch.linalg.cholesky(gram).t()  # ||V root||^2 = V gram V^T
    found = in_turn(weight, gram, group_size, 0.0)
    energy = (weight @ root.t()).square().sum()
    left = list(range(columns // group_size))

    def error_of(groups):
        kept = torch.tensor([g * group_size + i for g in groups for i in range(group_size)], dtype=torch.int64)
        fitted = torch.linalg.lstsq(root[:, kept], root @ weight.t()).solution
        return (root[:, kept] @ fitted - root @ weight.t()).square().sum() / energy, fitted.t(), kept

    for gone, group in enumerate(found.order.tolist(), 1):
        candidates = {g: float(error_of([other for other in left if other != g])[0]) for g in left}
        assert group == min(candidates, key=candidates.__getitem__)
        left.remove(group)
        error, fitted, kept = error_of(left)
        assert float(found.errors[gone]) == pytest.approx(float(error), rel=1e-6)
        if left:
            torch.testing.assert_close(refitted(weight, gram, kept, 0.0), fitted)
    assert float(found.errors[0]) == 0
    assert float(found.errors[-1]) == pytest.approx(1)


def test_inputs_that_were_always_zero_go_first_and_free():
    weight, gram = layer(4, 6)
    gram[2], gram[:, 2] = 0, 0
    found = in_turn(weight, gram, 1, 1e-6)
    assert int(found.order[0]) == 2
    assert float(found.errors[1]) < 1e-4


def table_of(path, groups, neurons):
    path.write_text(json.dumps({"groups": groups, "neurons": neurons}))
    return str(path)


def test_written_models_are_refitted_and_as_fast_as_the_table_says(text, tokenizer, tmp_path):  # noqa: F811
    model = save(tmp_path / "in", tokenizer, num_hidden_layers=2)
    groups = {str(size): 10.0 + 10 * size for size in range(1, 4)}
    neurons = {str(size): 20.0 + size for size in (8, 16, 24, 32, 40, 48, 56)}
    options = {"type": "ziplm", "speedup": 2, "further_speedups": [1.3], "shrink": 0.85}
    options["latency_table"] = table_of(tmp_path / "table.json", groups, neurons)
    config = recipe(tmp_path / "in", text, tmp_path, options)
    (report,) = compress(config, tmp_path / "out")
    assert "speedup-1.3 reaches" in str(report)
    rows, dense = rows_of(config, tokenizer), 2 * (groups["3"] + neurons["56"])
    inputs = seen(model, rows)
    for folder, asked in ((tmp_path / "out", 2), (tmp_path / "out" / "speedup-1.3", 1.3)):
        small = load(folder)
        kept = zip(small.config.num_key_value_heads_by_layer, small.config.intermediate_size_by_layer, strict=True)
        time = sum((groups[str(g)] if g else 0) + (neurons[str(n)] if n else 0) for g, n in kept)
        assert dense / time >= asked
        assert dense / time < asked * 1.35  # and no faster than steps of sizes make it
        with torch.no_grad():
            assert torch.isfinite(small(**rows, use_cache=False).logits).all()
    # The first layer's down projection, refitted by least squares on its own inputs.
    x = inputs["model.layers.0.mlp.down_proj"][0].flatten(0, -2).double()
    after, before = small.model.layers[0].mlp, model.model.layers[0].mlp
    rows_of_up = before.up_proj.weight.detach()
    index = [int((rows_of_up == row).all(1).nonzero()) for row in after.up_proj.weight.detach()]
    want = refitted(before.down_proj.weight.detach(), x.t() @ x, torch.tensor(index), 0.01)
    torch.testing.assert_close(after.down_proj.weight.detach(), want, rtol=2e-3, atol=2e-3)


def test_a_table_is_measured_where_there_is_none_and_read_again(text, tokenizer, tmp_path):  # noqa: F811
    save(tmp_path / "in", tokenizer, dtype=torch.float32, num_hidden_layers=2)
    path = tmp_path / "made" / "table.json"
    options = {"type": "ziplm", "speedup": 1.5, "sequence_length": 8, "latency_table": str(path), "multiple_of": 28}
    config = recipe(tmp_path / "in", text, tmp_path, options)
    compress(config, tmp_path / "out")
    table = read_table(str(path))
    assert set(table.groups) == {0, 1, 2, 3}
    assert set(table.neurons) == {0, 28, 56}
    assert all(us > 0 for size, us in [*table.groups.items(), *table.neurons.items()] if size)
    with pytest.raises(ConfigError, match="no neurons of size 8"):
        compress(recipe(tmp_path / "in", text, tmp_path, options | {"multiple_of": 8}), tmp_path / "no")


@pytest.mark.parametrize(
    "written", ["{}", "[]", '{"groups": {"1": null}, "neurons": {}}', '{"groups": {"1": NaN}, "neurons": {}}']
)
def test_a_file_that_is_no_table(written, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(written)
    with pytest.raises(ConfigError, match="is no table"):
        read_table(str(path))


def test_measured_are_the_halves_that_were_asked_for():
    class Layer:
        input_layernorm = post_attention_layernorm = staticmethod(lambda hidden: hidden)

        def __init__(self, calls, size):
            self.self_attn = lambda hidden_states: calls.append(("attention", size))
            self.mlp = lambda hidden: calls.append(("mlp", size))

    calls = []
    found = measure(lambda g, n: (Layer(calls, (g, n)), {}), [1, 2], [5], torch.zeros(1, 2, 3))
    assert set(calls) == {("attention", (1, 1)), ("attention", (2, 1)), ("mlp", (1, 5))}
    assert set(found.groups) == {0, 1, 2}
    assert found.neurons[0] == 0


def test_requests_that_do_not_fit(tmp_path):
    passes = [{"type": "ziplm", "speedup": 2, "further_speedups": [1.5]}, {"type": "cfsp", "sparsity": 0.5}]
    with pytest.raises(ValueError, match="put ziplm last, or ask it for one model"):
        recipe(tmp_path / "in", tmp_path / "text", tmp_path, *passes)
    with pytest.raises(ValueError, match="numbers above 1, each once"):
        parse_pass({"type": "ziplm", "speedup": 2, "further_speedups": [1.5, 1.5]})
