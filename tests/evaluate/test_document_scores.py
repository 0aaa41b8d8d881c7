"""Scores of prepared documents against the formula, whatever the batches and ranks; going on; and what is refused."""

import json
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from leanmill.cli.main import main
from leanmill.core.errors import ConfigError
from leanmill.data.build import build_tokenizer, build_train_data
from leanmill.data.config import DataConfig
from leanmill.data.prepare import prepare_data
from leanmill.data.prepared import open_prepared
from leanmill.data.selection import read_scores, score_file
from leanmill.evaluate import document_scores
from leanmill.evaluate.document_scores import begin_together, document_losses, score_documents
from tests.distributed import run_ranks


SEQUENCE_LENGTH = 12


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A prepared folder and two models with its tokenizer."""
    folder = tmp_path_factory.mktemp("scores")
    lines = [{"text": f"line {i} of words {i * i}" * (1 + i % 5)} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    raw = {
        "source": {"type": "hf", "path": str(folder / "rows.jsonl"), "validation_fraction": 0},
        "tokenizer": {"vocab_size": 300},
        "sequence_length": SEQUENCE_LENGTH,
        "cache_dir": str(folder / "cache"),
    }
    config = DataConfig.model_validate(raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("leanmill.data.encoding._BATCH_CHARS", 200)
        prepare_data(config, folder / "prepared", shard_tokens=200, tell=lambda line: None)
    for seed, name in enumerate(("teacher", "reference")):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"num_key_value_heads": 1, "max_position_embeddings": 64, "vocab_size": 300, "initializer_range": 0.3}
        AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).save_pretrained(folder / name)
        build_tokenizer(config).save_pretrained(folder / name)
    return folder


def config_of(files, **source):
    source = {"type": "prepared", "path": str(files / "prepared"), **source}
    raw = {"source": source, "sequence_length": SEQUENCE_LENGTH, "cache_dir": str(files / "cache")}
    return DataConfig.model_validate(raw)


def score(files, out, **options):
    given = {"teacher": files / "teacher", "reference": files / "reference", "device": torch.device("cpu")}
    return score_documents(config_of(files), out, **{"tell": lambda line: None, **given, **options})


def scores_in(files, out):
    domain = open_prepared(config_of(files).source, config_of(files))[0]
    documents = [one for shard in range(domain.num_shards) for one in domain.shard_documents(shard)]
    return documents, read_scores(out, domain=domain.name, text=domain.text, num_documents=len(documents))


def test_a_score_is_the_difference_of_mean_log_probabilities(files, tmp_path, monkeypatch):
    score(files, tmp_path / "scores")
    documents, scores = scores_in(files, tmp_path / "scores")
    assert max(map(len, documents)) > 2 * SEQUENCE_LENGTH + 1
    models = [AutoModelForCausalLM.from_pretrained(files / name) for name in ("teacher", "reference")]
    for document, got in zip(documents, scores, strict=True):
        ids, log_ratio = torch.from_numpy(document.astype(np.int64)), 0.0
        for start in range(0, len(ids) - 1, SEQUENCE_LENGTH):
            piece = ids[start : start + SEQUENCE_LENGTH + 1]
            with torch.no_grad():
                logs = [model(piece[None, :-1]).logits[0].log_softmax(-1) for model in models]
            of_teacher, of_reference = (one.gather(1, piece[1:, None]).sum().item() for one in logs)
            log_ratio += of_teacher - of_reference
        assert got == pytest.approx(log_ratio / (len(ids) - 1), abs=1e-5)
    monkeypatch.setattr("leanmill.evaluate.document_scores._LOGITS_PER_BATCH", 1)
    one_by_one = document_losses(models[0], documents[:5], SEQUENCE_LENGTH)
    monkeypatch.undo()
    np.testing.assert_allclose(document_losses(models[0], documents[:5], SEQUENCE_LENGTH), one_by_one, rtol=1e-5)


def test_documents_without_a_prediction_have_no_score(files):
    model = AutoModelForCausalLM.from_pretrained(files / "teacher")
    found = document_losses(model, [np.asarray([5]), np.asarray([5, 6]), np.asarray([], dtype=np.int64)], 8)
    assert np.isnan(found).tolist() == [True, False, True]


def test_ranks_share_the_shards_and_ended_scoring_goes_on(files, tmp_path):
    whole = score(files, tmp_path / "whole")
    first = score(files, tmp_path / "parts", rank=0, world_size=2)
    with pytest.raises(ConfigError, match="have no scores yet"):
        scores_in(files, tmp_path / "parts")
    second = score(files, tmp_path / "parts", rank=1, world_size=2)
    assert 1 < first.num_shards < whole.num_shards == first.num_shards + second.num_shards
    np.testing.assert_array_equal(scores_in(files, tmp_path / "parts")[1], scores_in(files, tmp_path / "whole")[1])
    (tmp_path / "parts" / "domain-0" / score_file(1)).unlink()
    again = score(files, tmp_path / "parts")
    assert again.num_kept == whole.num_shards - 1
    assert again.num_documents < whole.num_documents


def test_the_command_scores_and_training_reads_it(files, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{config: {{model_type: llama}}}}\ntrain: {{epochs: 1}}\ndevice: cpu\ndata:\n  sequence_length: 12\n"
        f"  source: {{type: prepared, path: {files}/prepared}}\n"
        "batch: {tokens_per_step: 12, tokens_per_micro_batch: 12}\n"
    )
    models = ["--teacher", f"{files}/teacher", "--reference", f"{files}/reference"]
    assert main(["data", "score", str(path), *models, "--out", f"{tmp_path}/scores"]) == 0
    assert f"data.source.scores={tmp_path}/scores" in capsys.readouterr().out
    config = config_of(files, scores=f"{tmp_path}/scores", kept_share=0.25)
    data = build_train_data(config, build_tokenizer(config), seed=0)
    whole = build_train_data(config_of(files), build_tokenizer(config), seed=0)
    assert data.rows_per_epoch < 0.4 * whole.rows_per_epoch
    assert main(["data", "score", str(path), "--out", f"{tmp_path}/scores"]) != 0
    assert "--teacher MODEL --reference MODEL" in capsys.readouterr().err


def test_what_cannot_be_scored_is_refused(files, tmp_path):
    score(files, tmp_path / "scores")
    with pytest.raises(ConfigError, match="has scores of other data, models"):
        score(files, tmp_path / "scores", reference=files / "teacher")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="is there already and holds no scores"):
        score(files, tmp_path / "used")
    text = config_of(files).model_copy(update={"task": "sft"})
    with pytest.raises(ConfigError, match="data score reads prepared text"):
        score_documents(text, tmp_path, teacher=tmp_path, reference=tmp_path, device=torch.device("cpu"))


def test_a_folder_that_another_rank_is_making_is_no_strangers(tmp_path, monkeypatch):
    facts = {"domains": [{"folder": "domain-0"}]}

    def body():
        write = document_scores.write_whole

        def slowly(path, given):
            time.sleep(0.3)
            write(path, given)

        monkeypatch.setattr(document_scores, "write_whole", slowly)
        time.sleep(0.1 * dist.get_rank())  # comes while the first one is at it
        begin_together(tmp_path / "scores", facts, dist.get_rank())
        with pytest.raises(ConfigError, match="has scores of other data"):
            begin_together(tmp_path / "scores", {**facts, "rank": dist.get_rank()}, dist.get_rank())
        return True

    assert run_ranks(body, 2) == [True, True]
