"""Training on the best documents of prepared data: which they are, their rows, resuming, and what is refused."""

import numpy as np
import pytest
import torch

from leanmill.core.errors import ConfigError
from leanmill.data.build import build_tokenizer, build_train_data
from leanmill.data.cache import write_json
from leanmill.data.config import DataConfig, Prepared
from leanmill.data.prepare import prepare_data
from leanmill.data.prepared import open_prepared
from leanmill.data.selection import SCORES, ChosenTokens, best_documents, score_file
from tests.data.samples import hf_config, sentences, write_jsonl


def test_the_best_documents_have_the_share_of_tokens():
    scores, lengths = np.asarray([0.1, np.nan, 0.5, 0.5, -2.0]), np.asarray([10, 40, 20, 10, 20])
    kept = {share: best_documents(scores, lengths, share).tolist() for share in (0.01, 0.2, 0.21, 0.4, 0.6, 0.61, 1.0)}
    assert kept == {
        0.01: [2],
        0.2: [2],
        0.21: [2, 3],
        0.4: [0, 2, 3],
        0.6: [0, 2, 3, 4],
        0.61: [0, 1, 2, 3, 4],
        1.0: [0, 1, 2, 3, 4],
    }


def test_chosen_tokens_are_those_of_their_documents():
    tokens, lengths = np.arange(20), np.asarray([3, 0, 7, 1, 9])
    offsets, kept = np.concatenate([[0], np.cumsum(lengths)]), np.asarray([0, 1, 3, 4])
    chosen = ChosenTokens(tokens, offsets[kept], np.concatenate([[0], np.cumsum(lengths[kept])]))
    wanted = np.concatenate([tokens[offsets[one] : offsets[one + 1]] for one in kept])
    assert len(chosen) == len(wanted) == 13
    assert chosen[np.arange(13)].tolist() == wanted.tolist()
    assert chosen[np.asarray([[12, 0], [3, 2]])].tolist() == [[19, 0], [10, 2]]


@pytest.fixture
def prepared(tmp_path, tokenizer, monkeypatch):
    """A config of prepared text, and a function that writes scores of it."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in sentences(60)])
    given = {"tokenizer": {"path": str(tmp_path / "tokenizer")}, "sequence_length": 16}
    text = hf_config(path, tmp_path, source={"validation_fraction": 0}, **given)
    monkeypatch.setattr("leanmill.data.encoding._BATCH_CHARS", 700)
    prepare_data(text, tmp_path / "prepared", shard_tokens=400, tell=lambda line: None)
    raw = text.model_dump() | {"source": {"type": "prepared", "path": str(tmp_path / "prepared")}, "tokenizer": {}}
    config = DataConfig.model_validate(raw)
    return config, open_prepared(config.source, config)[0]


def write_scores(folder, domain, scores):
    (folder / "domain-0").mkdir(parents=True)
    sizes = [len(domain.shard_documents(shard)) for shard in range(domain.num_shards)]
    for shard, part in enumerate(np.split(scores, np.cumsum(sizes)[:-1])):
        np.save(folder / "domain-0" / score_file(shard), part)
    one = {"name": domain.name, "text": domain.text, "num_shards": domain.num_shards, "folder": "domain-0"}
    write_json(folder / SCORES, {"domains": [one]})


def scored(config, folder, **changes):
    return config.model_copy(
        update={"source": config.source.model_copy(update={"scores": str(folder), "kept_share": 0.3, **changes})}
    )


def build(config):
    return build_train_data(config, build_tokenizer(config), seed=3)


def test_rows_hold_the_chosen_documents_and_go_on_exactly(prepared, tmp_path):
    config, domain = prepared
    documents = [one for shard in range(domain.num_shards) for one in domain.shard_documents(shard)]
    scores = np.random.default_rng(0).normal(size=len(documents))
    write_scores(tmp_path / "scores", domain, scores)
    kept = best_documents(scores, np.asarray([len(one) for one in documents]), 0.3)
    data = build(scored(config, tmp_path / "scores"))
    assert f"{len(kept)} of {len(documents)} documents chosen" in data.describe()
    rows = data.next_rows(data.rows_per_epoch)
    wanted = np.bincount(np.concatenate([documents[one] for one in kept]), minlength=320)
    seen = np.bincount(rows["labels"][rows["labels"] >= 0].numpy(), minlength=320)
    assert (seen <= wanted).all()
    assert seen.sum() > 0.8 * wanted.sum()  # all but first tokens of documents and the end that fills no row
    assert data.position_tokens == data.rows_per_epoch * 16
    state, following = data.state_dict(), data.next_rows(6)
    (tmp_path / "scores").rename(tmp_path / "moved")
    again = build(scored(config, tmp_path / "moved"))
    again.load_state_dict(state)
    assert all(torch.equal(value, following[name]) for name, value in again.next_rows(6).items())
    write_scores(tmp_path / "other", domain, -scores)
    with pytest.raises(ConfigError, match="trained on other data: text of"):
        build(scored(config, tmp_path / "other")).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"data\.source\.kept_share=0\.3"):
        build(scored(config, tmp_path / "moved", kept_share=0.5)).load_state_dict(state)


def test_scores_that_do_not_fit_are_refused(prepared, tmp_path):
    config, domain = prepared
    with pytest.raises(ConfigError, match="holds no scores; run `leanmill data score"):
        build(scored(config, tmp_path / "none"))
    num_documents = sum(len(domain.shard_documents(shard)) for shard in range(domain.num_shards))
    write_scores(tmp_path / "scores", domain, np.zeros(num_documents))
    (tmp_path / "scores" / "domain-0" / score_file(1)).unlink()
    with pytest.raises(ConfigError, match="1 of .* shards of .* have no scores yet.*goes on"):
        build(scored(config, tmp_path / "scores"))
    write_json(tmp_path / "scores" / SCORES, {"domains": []})
    with pytest.raises(ConfigError, match="has no scores of the text of"):
        build(scored(config, tmp_path / "scores"))
    with pytest.raises(ValueError, match="kept_share: it chooses documents by their scores"):
        Prepared(path="prepared", kept_share=0.5)
    other = config.model_copy(update={"task": "preference"})
    with pytest.raises(
        ConfigError, match="scores are of text and conversations, and the recipe has data.task=preference"
    ):
        build(scored(other, tmp_path / "scores"))
