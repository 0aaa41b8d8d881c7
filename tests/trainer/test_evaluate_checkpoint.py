import json

import pytest

from leanmill.cli.main import main
from leanmill.core.errors import ConfigError
from leanmill.trainer.evaluate_checkpoint import evaluate_checkpoint


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of two steps whose evaluation the command must repeat."""
    folder = tmp_path_factory.mktemp("run")
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"line {i} of some words {i * i}\n" * 6}) + "\n" for i in range(120)))
    recipe = folder / "tiny.yaml"
    recipe.write_text(
        f"""
run_dir: {folder}/run
device: cpu
model: {{config: {{model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2,
  num_attention_heads: 2, num_key_value_heads: 2, vocab_size: 300, tie_word_embeddings: true}}}}
data: {{source: {{type: hf, path: {text}, validation_fraction: 0.2}}, tokenizer: {{vocab_size: 300}},
  sequence_length: 32, cache_dir: {folder}/cache}}
techniques: [{{type: ternary}}]
engine: single
batch: {{tokens_per_step: 128, tokens_per_micro_batch: 64}}
train: {{steps: 2, precision: fp32}}
eval: {{tokens_per_domain: 256}}
log: {{tensorboard: false, report: false}}
"""
    )
    assert main(["train", str(recipe)]) == 0
    return folder / "run"


def test_repeats_the_scores_of_the_run(run_dir, capsys):
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if record["kind"] == "eval"][-1]
    assert main(["eval", "--checkpoint", str(run_dir), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["step"] == 2
    assert values["domains"]["all"]["loss"] == pytest.approx(trained["domains"]["all"]["loss"], rel=1e-5)
    assert main(["eval", "--checkpoint", str(run_dir)]) == 0
    assert "bits/byte" in capsys.readouterr().out


def test_what_belongs_to_the_weights_stays(run_dir):
    checkpoint = next((run_dir / "checkpoints").glob("step-*"))
    with pytest.raises(ConfigError, match="belongs to the trained weights"):
        evaluate_checkpoint(checkpoint, ["model.config.hidden_size=64"])
    fewer = evaluate_checkpoint(checkpoint, ["eval.tokens_per_domain=64"])
    assert fewer.scores["all"].num_tokens < evaluate_checkpoint(checkpoint).scores["all"].num_tokens
