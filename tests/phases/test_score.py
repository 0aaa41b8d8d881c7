"""Phases that score the documents of their data and train on the best, with models that earlier phases left."""

import shutil

import numpy as np
import pytest
import torch

from leanmill.checkpoint.finding import locate
from leanmill.checkpoint.reading import read_full_state
from leanmill.core.errors import ConfigError
from leanmill.data.config import DataConfig
from leanmill.data.prepare import prepare_data
from leanmill.evaluate.document_scores import score_documents
from leanmill.export import export_model
from leanmill.phases.run import run
from leanmill.recipe.root import Recipe
from leanmill.trainer.run import run as run_one
from tests.data.samples import write_texts
from tests.distributed import run_ranks


SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG = {"model_type": "llama", "num_key_value_heads": 1, "max_position_embeddings": 32, "vocab_size": 300, **SIZES}
SMALL = {"num_hidden_layers": 1}
REFERENCE = {"name": "reference", "overrides": {"train.steps": 2, "model.config": SMALL}}
TEACHER = {"name": "teacher", "start_from": "base", "overrides": {"train.steps": 4}}
BEST = {
    "name": "best",
    "start_from": "base",
    "score": {"teacher_model": "phase:teacher", "reference_model": "phase:reference", "kept_share": 0.4},
    "overrides": {"train.steps": 3},
}


def recipe(home, run_dir, *phases, source=None, **more):
    base = {
        "run_dir": str(run_dir),
        "device": "cpu",
        "model": {"config": CONFIG},
        "data": {
            "source": {"type": "prepared", "path": str(home / "prepared"), **(source or {})},
            "sequence_length": 16,
            "cache_dir": str(home / "cache"),
        },
        "schedule": {"type": "constant", "warmup_steps": 0},
        "batch": {"tokens_per_step": 64, "tokens_per_micro_batch": 32},
        "train": {"precision": "fp32"},
        "eval": {"tokens_per_domain": 32},
        "log": {"tensorboard": False, "report": False, "every_steps": 1},
        "phases": list(phases),
    }
    return Recipe.model_validate(base | more)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    write_texts(folder / "a.jsonl", 60)
    text = {"type": "hf", "path": str(folder / "a.jsonl"), "validation_fraction": 0.3}
    data = {"source": text, "tokenizer": {"vocab_size": 300}, "cache_dir": str(folder / "cache")}
    prepare_data(DataConfig.model_validate(data), folder / "prepared", shard_tokens=400, tell=lambda line: None)
    return folder


@pytest.fixture(scope="module")
def run_dir(home):
    assert run(recipe(home, home / "run", REFERENCE, TEACHER, BEST)).status == "finished"
    return home / "run"


def weights(folder):
    return read_full_state(locate(folder).path, "model")


def test_equals_the_same_by_hand(home, run_dir, tmp_path):
    for name, config, steps in (("reference", CONFIG | SMALL, 2), ("teacher", CONFIG, 4)):
        train = {"steps": steps, "precision": "fp32"}
        run_one(recipe(home, tmp_path / name, model={"config": config}, train=train))
        export_model(locate(tmp_path / name).path, tmp_path / f"{name}-model")
    models = {name: tmp_path / f"{name}-model" for name in ("teacher", "reference")}
    score_documents(
        recipe(home, tmp_path, REFERENCE, TEACHER, BEST).data, tmp_path / "scores", **models, device=torch.device("cpu")
    )
    chosen = {"scores": str(tmp_path / "scores"), "kept_share": 0.4}
    run_one(recipe(home, tmp_path / "best", source=chosen, train={"steps": 3, "precision": "fp32"}))
    by_hand, whole = weights(tmp_path / "best"), weights(run_dir)
    assert all(torch.equal(whole[name], value) for name, value in by_hand.items())
    assert not (run_dir / "phases" / "03-best" / "scoring").exists()


def test_a_run_that_moved_is_finished_and_scores_are_not_written_again(home, run_dir, tmp_path, monkeypatch):
    shutil.copytree(run_dir, tmp_path / "moved")
    monkeypatch.setattr("leanmill.phases.run.score_documents", None)
    assert run(recipe(home, tmp_path / "moved", REFERENCE, TEACHER, BEST)).status == "finished"
    (tmp_path / "moved" / "phases" / "03-best" / "done.json").unlink()
    shutil.rmtree(tmp_path / "moved" / "phases" / "03-best" / "checkpoints")
    assert run(recipe(home, tmp_path / "moved", REFERENCE, TEACHER, BEST)).step == 9
    assert all(torch.equal(value, weights(run_dir)[name]) for name, value in weights(tmp_path / "moved").items())
    other = {**BEST, "score": {**BEST["score"], "kept_share": 0.5}}
    with pytest.raises(ConfigError, match=r"\(.*data\.source\.kept_share 0\.4 -> 0\.5"):
        run(recipe(home, run_dir, REFERENCE, TEACHER, other))


@pytest.mark.slow
def test_ranks_share_the_scoring(home, run_dir, tmp_path):
    given = recipe(home, tmp_path / "run", REFERENCE, TEACHER, BEST, engine="ddp")
    assert run_ranks(lambda: run(given).status, 2) == ["finished", "finished"]
    for name, value in weights(tmp_path / "run").items():
        torch.testing.assert_close(value, weights(run_dir)[name], rtol=1e-4, atol=1e-5)


def test_a_model_that_cannot_score_is_refused_before_the_first_phase(home, run_dir, tmp_path):
    def refuses(teacher, says):
        given = {**BEST, "score": {"teacher_model": str(teacher), "reference_model": "phase:reference"}}
        with pytest.raises(ConfigError, match=says):
            run(recipe(home, tmp_path / "run", REFERENCE, given))
        assert not (tmp_path / "run" / "phases").exists()

    refuses(tmp_path, r"phases\.1\.score\.teacher_model .* is no Hugging Face folder")
    model = shutil.copytree(run_dir / "phases" / "02-teacher" / "model", tmp_path / "other")
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace('"max_position_embeddings": 32', '"max_position_embeddings": 8'))
    refuses(model, r"has 8 positions; type data\.sequence_length=8 or less")
    tokenizer = model / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|endoftext|>", "<|theend|>").replace("</s>", "<|theend|>"))
    refuses(model, "has another tokenizer than the prepared data")


def test_a_phase_recovers_on_what_was_chosen_for_it(home, run_dir, tmp_path):
    models = run_dir / "phases"
    score = {"method": "paser", "kept_share": 0.5, "num_clusters": 2}
    score |= {"teacher_model": str(models / "02-teacher" / "model"), "reference_model": "phase:reference"}
    recovered = {"name": "recover", "start_from": "base", "score": score, "overrides": {"train.steps": 1}}
    given = recipe(home, tmp_path / "run", REFERENCE, recovered)
    assert run(given).status == "finished"
    scored = tmp_path / "run" / "phases" / "02-recover" / "scored" / "domain-0"
    scores = np.concatenate([np.load(path) for path in sorted(scored.glob("scores-*.npy"))])
    assert 0 < np.isfinite(scores).sum() <= len(scores) // 2
    (tmp_path / "run" / "phases" / "02-recover" / "done.json").unlink()
    other = {**recovered, "score": {**score, "num_clusters": 3}}
    with pytest.raises(ConfigError, match=r"asked for otherwise \(num_clusters 2 -> 3\); remove it to score anew"):
        run(recipe(home, tmp_path / "run", REFERENCE, other))
