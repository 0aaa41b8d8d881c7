"""The study of a mixture's routing: on models whose routing is known, and of a run's checkpoints."""

from __future__ import annotations

import json

import pytest
import torch

from leanmill.cli.main import main
from leanmill.core.errors import ConfigError
from leanmill.study.capture import Capture
from leanmill.study.routing import document
from tests.core.tiny import VOCAB_SIZE, tiny


def captured(model, seed: int = 0) -> Capture:
    """What its routers choose for two domains, of which the second ends with a row that only stands in."""
    capture = Capture(model.eval())
    capture.take()
    generator = torch.Generator().manual_seed(seed)
    for num_missing in (0, 1):
        for _ in range(2):
            ids = torch.randint(VOCAB_SIZE, (8, 32), generator=generator)
            labels = ids.clone()
            labels[8 - num_missing :] = -100
            capture.begin({"input_ids": ids, "labels": labels})
            with torch.no_grad():
                model(input_ids=ids, use_cache=False)
        capture.take()
    capture.find({"first": torch.zeros(0), "second": torch.zeros(0)})
    return capture


def by_token(seed: int = 0, scale: float = 1.0):
    """A mixture whose first layer adds nothing of other tokens before it routes."""
    model = tiny("mixtral", seed=seed)
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    model.model.layers[1].self_attn.o_proj.weight.data.mul_(scale)
    return model


def test_a_layer_that_attention_does_not_reach_routes_by_token_alone():
    found = document(7, captured(by_token(scale=30)))
    assert found["layers"] == [0, 1]
    assert found["dependence"]["agreement"][0] == 1
    assert found["dependence"]["agreement"][1] < 0.95
    assert found["dependence"]["token"][0] > found["dependence"]["token"][1] + 0.1
    assert found["dependence"]["position"][0] < 0.05


def test_rows_that_stand_in_are_left_out():
    capture = captured(tiny("mixtral"))
    assert [len(capture.by_domain[name][0].tokens) for name in ("first", "second")] == [16, 14]
    assert len(capture.all_domains(1).tokens) == 30


def test_a_checkpoint_agrees_with_itself_and_hardly_with_another_model():
    last = captured(by_token())
    same, other = document(7, last, [(3, captured(by_token())), (5, captured(by_token(seed=1)))])["learning"]
    assert (same["step"], same["share"]) == (3, [1, 1])
    assert max(other["share"]) < 0.9
    assert other["by_chance"] == pytest.approx([0.5, 0.5], abs=0.2)


def test_collapsed_routers_drop_the_end():
    model = tiny("mixtral")
    for layer in model.model.layers:
        # Logits that do not depend on the token: the same two of four experts get everything.
        layer.mlp.gate.weight.data.zero_()
    drops = document(7, captured(model))["drops"]
    assert drops["as_run"] is None
    assert drops["by_capacity"]["1.0"] == [0] * 8 + [1] * 8
    assert drops["by_capacity"]["2.0"] == [0] * 16


def test_a_dense_model_is_refused():
    with pytest.raises(ConfigError, match="has no routers"):
        Capture(tiny("llama"))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of four steps of a mixture, two of its checkpoints kept."""
    folder = tmp_path_factory.mktemp("run")
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"line {i} of some words {i * i}\n" * 6}) + "\n" for i in range(120)))
    recipe = folder / "tiny.yaml"
    recipe.write_text(
        f"""
run_dir: {folder}/run
device: cpu
model: {{config: {{model_type: mixtral, hidden_size: 32, intermediate_size: 24, num_hidden_layers: 2,
  num_attention_heads: 2, num_key_value_heads: 2, num_local_experts: 4, num_experts_per_tok: 2, vocab_size: 300}}}}
data: {{source: {{type: hf, path: {text}, validation_fraction: 0.2}}, tokenizer: {{vocab_size: 300}},
  sequence_length: 32, cache_dir: {folder}/cache}}
engine: single
batch: {{tokens_per_step: 128, tokens_per_micro_batch: 64}}
train: {{steps: 4, precision: fp32}}
eval: {{every_steps: 2, tokens_per_domain: 512}}
checkpoint: {{every_steps: 4, keep_steps: [1]}}
log: {{tensorboard: false, every_steps: 1}}
"""
    )
    assert main(["train", str(recipe)]) == 0
    return folder / "run"


def test_of_a_run_from_the_command_line(run_dir, capsys):
    assert main(["eval", "--checkpoint", str(run_dir), "--routing"]) == 0
    printed = capsys.readouterr().out
    assert "experts predicted by token" in printed
    assert "step 1 chose" in printed
    found = json.loads((run_dir / "routing.json").read_text())
    assert found["step"] == 4
    assert [one["step"] for one in found["learning"]] == [1]
    assert 0.3 < found["learning"][0]["share"][0] <= 1
    assert main(["report", str(run_dir)]) == 0
    page = (run_dir / "report.html").read_text()
    assert "Routing of the checkpoint at step 4" in page
    assert 'data-heat="drops"' in page
    assert 'data-chart="learning"' in page
