import json

import pytest

from leanmill.cli.main import main
from leanmill.core.errors import ConfigError
from leanmill.recipe.io import load_recipe
from leanmill.report.records import read_records
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


def test_a_model_folder_has_the_score_of_the_checkpoint_it_is_an_export_of(run_dir, tmp_path, capsys):
    out = tmp_path / "exported"
    assert main(["export", "--checkpoint", str(run_dir), "--to", "hf", "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["eval", "--checkpoint", str(run_dir), "--json"]) == 0
    of_run = json.loads(capsys.readouterr().out)["domains"]["all"]
    recipe = str(run_dir.parent / "tiny.yaml")
    assert main(["eval", "--checkpoint", str(out), "--recipe", recipe, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["step"] is None
    assert values["domains"]["all"]["num_tokens"] == of_run["num_tokens"]
    assert values["domains"]["all"]["loss"] == pytest.approx(of_run["loss"], rel=1e-5)
    assert main(["eval", "--checkpoint", str(out), "--recipe", recipe, "eval.tokens_per_domain=999936"]) == 0
    assert "held-out tokens and is evaluated on those, 999,936 were asked for" in capsys.readouterr().out


def test_a_run_is_named_as_a_model_and_as_a_teacher(run_dir, tmp_path, capsys):
    recipe = str(run_dir.parent / "tiny.yaml")
    overrides = [
        f"run_dir={tmp_path}/next", f"model.path={run_dir}", "model.config=null", "log.every_steps=1",
        f"techniques=[{{type: distill, teacher: {run_dir}}}]", "train.steps=1", "optimizer.lr=1e-9",
    ]  # fmt: skip
    assert main(["check", recipe, *overrides]) == 0
    assert capsys.readouterr().out.count("it is a run, whose model training writes first") == 2
    assert not (run_dir / "models").exists()
    assert main(["train", recipe, *overrides]) == 0
    assert "cross_entropy " in capsys.readouterr().err
    written = sorted(path.name for path in (run_dir / "models").iterdir() if path.is_dir())
    assert written == ["step-00000002", "step-00000002-float"]
    step = next(r for r in read_records(tmp_path / "next" / "metrics.jsonl") if r["kind"] == "step")
    assert abs(step["losses"]["distill"]) < 1e-4  # the student is its own teacher
    saved = load_recipe(tmp_path / "next" / "recipe.yaml")
    assert saved.model.path == str(run_dir / "models" / "step-00000002-float")
    assert saved.data.tokenizer.path == saved.model.path


def test_a_recipe_is_for_model_folders_only(run_dir, tmp_path, capsys):
    assert main(["eval", "--checkpoint", str(run_dir), "--recipe", "r.yaml"]) == 2
    assert "--recipe is for Hugging Face model folders" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert main(["eval", "--checkpoint", str(tmp_path)]) == 2
    assert "holds no weights" in capsys.readouterr().err
    assert main(["eval", "--checkpoint", str(tmp_path), "model.path=x"]) == 2
    assert "belongs to the trained weights" in capsys.readouterr().err


def test_what_belongs_to_the_weights_stays(run_dir):
    checkpoint = next((run_dir / "checkpoints").glob("step-*"))
    with pytest.raises(ConfigError, match="belongs to the trained weights"):
        evaluate_checkpoint(checkpoint, ["model.config.hidden_size=64"])
    fewer = evaluate_checkpoint(checkpoint, ["eval.tokens_per_domain=64"])
    assert fewer.scores["all"].num_tokens < evaluate_checkpoint(checkpoint).scores["all"].num_tokens
