"""Encoders from data to a folder that plain transformers loads; a resume changes no bit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from leanmill.checkpoint.reading import read_full_state
from leanmill.core.errors import ConfigError
from leanmill.core.pooling import Pooling
from leanmill.export import export_model
from leanmill.export.run_models import with_models_of_runs
from leanmill.models.config import ModelConfig
from leanmill.models.sentence_transformers import pooling_of
from leanmill.recipe.root import Recipe
from leanmill.trainer.evaluate_checkpoint import evaluate_checkpoint
from leanmill.trainer.run import run
from tests.data.samples import write_texts


SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LAST = "checkpoints/step-00000004"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    write_texts(folder / "a.jsonl", 60)
    pairs = [{"anchor": f"text number {n}", "positive": f"number {n} it is"} for n in range(60)]
    pairs += [{"anchor": f"text {n}", "positive": f"number {n + 9}", "score": n / 20} for n in range(20)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    return folder


def masked_recipe(home, run_dir, *, model, techniques=()):
    return Recipe.model_validate(
        {
            "run_dir": str(run_dir),
            "device": "cpu",
            "model": {"task": "masked_lm", **model},
            "data": {
                "task": "masked",
                "source": {"type": "hf", "path": str(home / "a.jsonl"), "validation_fraction": 0.3},
                "tokenizer": {"vocab_size": 300},
                "sequence_length": 16,
                "cache_dir": str(home / "cache"),
            },
            "techniques": list(techniques),
            "batch": {"tokens_per_step": 64, "tokens_per_micro_batch": 32},
            "train": {"steps": 4, "precision": "fp32", "deterministic": True, "activation_checkpointing": "full"},
            "eval": {"tokens_per_domain": 64},
            "checkpoint": {"every_steps": 2},
            "log": {"every_steps": 1, "tensorboard": False, "report": False},
        }
    )


def pairs_recipe(home, run_dir, *, model, techniques, tokenizer=None):
    given = masked_recipe(home, run_dir, model={"config": {"model_type": "bert"}}).model_dump(mode="json")
    source = {"type": "hf", "path": str(home / "pairs.jsonl"), "validation_fraction": 0.3}
    given["model"] = {"task": "embedding", **model}
    given["data"] |= {"task": "sentence_pairs", "source": source, "sequence_length": 48}
    given["data"]["tokenizer"] |= {"path": tokenizer}
    batch = {"tokens_per_step": 384, "tokens_per_micro_batch": 192}
    evaluation = {"tokens_per_domain": 48 * 40}
    return Recipe.model_validate({**given, "techniques": list(techniques), "batch": batch, "eval": evaluation})


def resumed_bitwise(recipe_of, tmp_path):
    whole = run(recipe_of(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / LAST)
    run(recipe_of(tmp_path / "again"))
    for part in ("model", "optimizer"):
        expected, got = (read_full_state(tmp_path / run_dir / LAST, part) for run_dir in ("whole", "again"))
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], value) for key, value in expected.items()), part
    return whole


def test_masked_tokens_resume_bitwise_and_go_to_plain_transformers(home, tmp_path):
    model = {"config": {"model_type": "bert", "max_position_embeddings": 32, **SIZES}}
    techniques = [{"type": "nm_sparsity"}, {"type": "int_quant", "weight_bits": 4}]
    whole = resumed_bitwise(lambda run_dir: masked_recipe(home, run_dir, model=model, techniques=techniques), tmp_path)
    scores = evaluate_checkpoint(tmp_path / "whole" / LAST).scores
    assert scores["all"].loss == pytest.approx(whole.scores["all"].loss, rel=1e-6)
    with pytest.raises(ConfigError, match="is a format of causal models; type --to hf"):
        export_model(tmp_path / "whole" / LAST, tmp_path / "packed", packing="int4")
    report = export_model(tmp_path / "whole" / LAST, tmp_path / "out", activations="float")
    assert report.sparsity
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = tokenizer(["one text", "another"], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")(**inputs).logits
        hidden = AutoModel.from_pretrained(tmp_path / "out")(**inputs).last_hidden_state
    assert logits.isfinite().all()
    assert hidden.shape[-1] == 16
    # And it is where the next run begins, a family at a time read by parts.
    again = masked_recipe(home, tmp_path / "next", model={"path": str(tmp_path / "out")})
    data = again.data.model_copy(
        update={"tokenizer": again.data.tokenizer.model_copy(update={"path": str(tmp_path / "out")})}
    )
    assert run(again.model_copy(update={"data": data})).step == 4


def test_vectors_of_texts_resume_bitwise_are_distilled_and_go_to_plain_transformers(home, tmp_path):
    model = {"config": {"model_type": "modernbert", "max_position_embeddings": 32, **SIZES}, "normalise": True}
    teacher = resumed_bitwise(
        lambda run_dir: pairs_recipe(home, run_dir, model=model, techniques=[{"type": "contrastive"}]), tmp_path
    )
    assert {"sentences/spearman", "sentences/retrieval_accuracy"} <= evaluated(tmp_path / "whole").metrics.keys()
    assert evaluated(tmp_path / "whole").scores["all"].loss == pytest.approx(teacher.scores["all"].loss, rel=1e-5)
    export_model(tmp_path / "whole" / LAST, tmp_path / "teacher")
    out = tmp_path / "teacher"
    assert [one["type"].rpartition(".")[2] for one in json.loads((out / "modules.json").read_text())] == [
        "Transformer",
        "Pooling",
        "Normalize",
    ]
    assert json.loads((out / "1_Pooling/config.json").read_text())["word_embedding_dimension"] == 16
    inputs = AutoTokenizer.from_pretrained(out)(["text number 3", "a"], padding=True, return_tensors="pt")
    with torch.no_grad():
        states = AutoModel.from_pretrained(out)(**inputs).last_hidden_state
    assert states.shape[-1] == 16
    # A narrower student of another family, two of four weights, learns from it through a map that stays behind.
    student = {"config": {"model_type": "distilbert", "dim": 8, "hidden_dim": 16, "n_layers": 1, "n_heads": 2}}
    techniques = [{"type": "embedding_distill", "teacher": str(tmp_path / "whole")}, {"type": "nm_sparsity"}]
    recipe = pairs_recipe(home, tmp_path / "student", model=student, techniques=techniques, tokenizer=str(out))
    resolved = with_models_of_runs(recipe)
    run(resolved)
    report = export_model(tmp_path / "student" / LAST, tmp_path / "small")
    assert report.sparsity
    assert not [name for name in load_file(tmp_path / "small/model.safetensors") if "around" in name]
    assert pooling_of(ModelConfig(task="embedding", path=str(out))) == Pooling("mean", normalise=True)


def evaluated(run_dir):
    return evaluate_checkpoint(run_dir / LAST)
