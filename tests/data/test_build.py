"""From a recipe's data section to rows, on the real built-in corpus and on small files."""

import time
from pathlib import Path

import pytest
import torch

from leanmill.core.errors import ConfigError
from leanmill.data.build import build_eval_data, build_tokenizer, build_train_data
from leanmill.data.config import DataConfig, HfDataset, LocalCorpus, Mixture, TokenizerConfig
from leanmill.data.tokenizer import tokenizer_fingerprint
from tests.data.samples import conversations, hf_config, write_jsonl, write_texts
from tests.distributed import run_ranks


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    config = DataConfig(
        source=LocalCorpus(max_bytes=400_000, validation_fraction=0.2),
        tokenizer=TokenizerConfig(vocab_size=512, num_training_bytes=300_000),
        sequence_length=128,
        cache_dir=str(tmp_path_factory.mktemp("cache")),
    )
    return config, build_tokenizer(config, seed=0)


def test_local_corpus_end_to_end(local):
    config, tokenizer = local
    data = build_train_data(config, tokenizer, seed=0)
    batch = data.next_rows(60)
    assert data.state_dict()["rows"] == {"python": 40, "cpp": 10, "english": 10}
    assert ((batch["labels"] != -100).float().mean(1) > 0.3).all()
    text = [tokenizer.decode(row) for row in batch["input_ids"]]
    assert any("self" in t or "import" in t or "def " in t for t in text)
    assert "python 67%" in data.describe()


def test_local_corpus_held_out_domains(local):
    config, tokenizer = local
    domains = build_eval_data(config, tokenizer, tokens_per_domain=4096)
    assert [d.name for d in domains] == ["python", "cpp", "english"]
    for domain in domains:
        assert domain.rows["labels"].shape == (32, 128)
        num_targets = int((domain.rows["labels"] != -100).sum())
        assert 1 < domain.num_bytes / num_targets < 8
        assert 3.5 < domain.order0_bits_per_byte < 6


def test_rows_take_less_than_a_millisecond_a_row(local):
    config, tokenizer = local
    data = build_train_data(config, tokenizer, seed=0)
    data.next_rows(8)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        data.next_rows(4)
        times.append(time.perf_counter() - start)
    assert sorted(times)[5] < 4e-3


def test_dropping_a_domain_with_weight_zero(local):
    config, tokenizer = local
    source = LocalCorpus(max_bytes=400_000, validation_fraction=0.2, domains={"python": 1.0, "cpp": 0.0})
    data = build_train_data(config.model_copy(update={"source": source}), tokenizer, seed=0)
    data.next_rows(3)
    assert data.state_dict()["rows"] == {"python": 3}
    with pytest.raises(ValueError, match="every weight is 0"):
        LocalCorpus(domains={"cpp": 0.0})


def _rank_rows(folder):
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    config = hf_config(f"{folder}/a.jsonl", Path(folder), tokenizer=TokenizerConfig(vocab_size=300))
    tokenizer = build_tokenizer(config, seed=0)
    data = build_train_data(config, tokenizer, seed=0)
    rows = data.next_rows(8, rank=rank, world_size=world_size)["input_ids"]
    (domain,) = build_eval_data(
        config.model_copy(update={"source": config.source.model_copy(update={"validation_fraction": 0.5})}),
        tokenizer,
        tokens_per_domain=64,
    )
    gathered = [torch.empty_like(rows) for _ in range(world_size)]
    torch.distributed.all_gather(gathered, rows)
    assert domain.num_bytes > 0
    torch.cat(gathered).numpy().tofile(f"{folder}/rank{rank}.bin")


def test_ranks_that_start_at_once_build_one_cache(tmp_path):
    write_texts(tmp_path / "a.jsonl", 50)
    run_ranks(_rank_rows, 2, str(tmp_path))
    assert (tmp_path / "rank0.bin").read_bytes() == (tmp_path / "rank1.bin").read_bytes()
    assert len([p for p in (tmp_path / "cache" / "tokens").iterdir() if p.is_dir()]) == 1
    assert len([p for p in (tmp_path / "cache" / "tokenizer").iterdir() if p.is_dir()]) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_tokenizer_trained_on_the_users_data(tmp_path, streaming):
    config = hf_config(
        write_texts(tmp_path / "a.jsonl", 50),
        tmp_path,
        source={"streaming": streaming},
        tokenizer=TokenizerConfig(vocab_size=330),
    )
    tokenizer = build_tokenizer(config, seed=0)
    assert len(tokenizer) == 330
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(build_tokenizer(config, seed=1))
    assert build_train_data(config, tokenizer, seed=0).next_rows(2)["input_ids"].shape == (2, 32)


def test_tokenizer_trained_on_conversations(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": c} for c in conversations(30)])
    config = hf_config(path, tmp_path, task="sft", tokenizer=TokenizerConfig(vocab_size=300), sequence_length=128)
    tokenizer = build_tokenizer(config, seed=0)
    batch = build_train_data(config, tokenizer, seed=0).next_rows(2)
    answers = tokenizer.decode(batch["labels"][batch["labels"] != -100])
    assert "answer" in answers
    assert "question" not in answers


def test_sft_on_the_built_in_corpus_is_refused(tmp_path, tokenizer):
    config = DataConfig(task="sft", cache_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="local_corpus has none"):
        build_train_data(config, tokenizer, seed=0)


def test_two_sources_of_one_name_are_refused(tmp_path, tokenizer):
    path = write_texts(tmp_path / "a.jsonl", 3)
    config = DataConfig(source=Mixture(sources=[HfDataset(path=path)] * 2), cache_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="two sources are named 'data'"):
        build_train_data(config, tokenizer, seed=0)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, tokenizer):
    from leanmill.core.errors import RunError

    (tmp_path / "file").write_text("")
    config = hf_config(write_texts(tmp_path / "a.jsonl", 3), tmp_path, cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(RunError, match=r"cannot write the data cache .*data\.cache_dir"):
        build_train_data(config, tokenizer, seed=0)


def test_rows_by_index_are_other_data_than_rows_by_a_table(tmp_path, monkeypatch):
    config = hf_config(write_texts(tmp_path / "a.jsonl", 50), tmp_path, tokenizer=TokenizerConfig(vocab_size=330))
    tokenizer = build_tokenizer(config)
    tables = build_train_data(config, tokenizer, seed=0)
    monkeypatch.setattr("leanmill.data.sources.TABLE_SIZE", 0)
    by_index = build_train_data(config, tokenizer, seed=0)
    with pytest.raises(ConfigError, match="rows by index"):
        by_index.load_state_dict(tables.state_dict())
