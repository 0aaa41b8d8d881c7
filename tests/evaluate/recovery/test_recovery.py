"""Groups, budgets and choice by the paper's and the authors' formulas, and a phase that trains on what they chose."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from leanmill.core.errors import ConfigError
from leanmill.data.build import build_tokenizer, build_train_data
from leanmill.data.config import DataConfig
from leanmill.data.prepare import prepare_data
from leanmill.evaluate.recovery.choice import Features, chosen_documents, efficiency, shares_of
from leanmill.evaluate.recovery.clusters import clusters_of, diffusion_components, factorised
from leanmill.evaluate.recovery.concepts import ConceptGraph, concepts_of
from leanmill.evaluate.recovery.scoring import choose_documents, features_of, js_divergence, measure_documents
from leanmill.recipe.phases import ScoreConfig


def islands(*sizes):
    """Points around a few far places [D, 3], and which."""
    rng = np.random.default_rng(0)
    which = np.repeat(np.arange(len(sizes)), sizes)
    return rng.normal(size=(len(which), 3)) * 0.1 + 4 * np.eye(3)[which], which


def test_components_are_eigenvectors_of_the_authors_laplacian():
    points, _ = islands(5, 6, 7)
    distances = np.linalg.norm(points[:, None] - points, axis=-1)
    affinity = np.exp(-(distances**2) / (2 * np.median(distances) ** 2))
    laplacian = np.eye(18) - affinity / affinity.sum(1)[:, None]
    found = diffusion_components(points, 3)
    values = np.sort(np.linalg.eigvals(laplacian).real)[:3]
    assert np.allclose(laplacian @ found, found * values, atol=1e-8)
    assert np.allclose(np.linalg.norm(found, axis=0), 1)


def test_groups_are_the_islands():
    points, which = islands(12, 9, 15)
    groups = clusters_of(points, 3, seed=0)
    assert len({*zip(groups.tolist(), which.tolist(), strict=True)}) == 3
    products = np.abs(np.random.default_rng(1).normal(size=(8, 2)))
    left, right = factorised(products @ products.T, 2, np.random.default_rng(2))
    assert left.min() >= 0 <= right.min()
    assert np.abs(left @ right - products @ products.T).max() < 0.05 * (products @ products.T).max()


def test_many_documents_go_where_the_nearest_group_is(monkeypatch):
    monkeypatch.setattr("leanmill.evaluate.recovery.clusters._AT_ONCE", 20)
    points, which = islands(30, 30, 30)
    groups = clusters_of(points, 3, seed=0)
    assert len({*zip(groups.tolist(), which.tolist(), strict=True)}) == 3


def test_divergence_budgets_and_efficiency_are_the_formulas():
    p, q = torch.randn(2, 7, 11, dtype=torch.float64).softmax(-1)
    m = (p + q) / 2
    want = 0.5 * ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1))
    torch.testing.assert_close(js_divergence(p.log() + 3, q.log() - 1), want)
    lost, groups = np.array([1.0, 3.0, 6.0, 0.5]), np.array([0, 0, 2, 1])
    # Means 2, 0.5 and 6 of 8.5 together.
    assert shares_of(lost, groups, 17) == {0: 4, 1: 1, 2: 12}
    assert np.allclose(efficiency(lost, np.array([2, 3, 4, 5])), lost / np.log(np.array([4, 9, 16, 25])))


def test_concepts_are_phrases_between_stop_words():
    assert concepts_of("The quick fox and a lazy dog, sorted by Merge-Sort!") == {
        "quick fox",
        "lazy dog",
        "sorted",
        "merge-sort",
    }
    graph = ConceptGraph()
    graph.add({"a", "b"})
    graph.add({"c", "d"})
    graph.add({"e"})
    assert graph.is_consistent({"a", "b", "new"})
    assert graph.is_consistent({"a", "e"})  # nothing is known of e
    assert not graph.is_consistent({"a", "c"})


def test_the_choice_takes_the_most_efficient_that_are_consistent():
    points, which = islands(4, 3)
    lost = np.array([0.4, 0.3, 0.2, 0.1, 0.9, 0.8, np.nan])
    features = Features(embeddings=points, degradation=lost, lengths=np.full(7, 10))
    about = [{"a", "b"}, {"c", "d"}, {"a", "c"}, {"a", "b", "e"}, {"g", "h"}, {"i", "j"}, {"k"}]
    # Means 0.25 and 0.85: of 11 documents 2 and 8, of which there are 2.
    found = chosen_documents(features, about.__getitem__, budget=11, num_clusters=2, seed=0)
    assert found.tolist() == [0, 1, 4, 5]
    # Of 15 documents 3: a and c are known, and of no one document, so that the next is taken.
    found = chosen_documents(features, about.__getitem__, budget=15, num_clusters=2, seed=0)
    assert found.tolist() == [0, 1, 3, 4, 5]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Conversations that are prepared, and a model before and after something was done to it."""
    folder = tmp_path_factory.mktemp("paser")
    subjects = ["sums of numbers", "rivers in france", "knitting wool socks"]
    chats = [
        [
            {"role": "user", "content": f"{subjects[i % 3]} {i}?"},
            {"role": "assistant", "content": f"{subjects[i % 3]}: {i * 7}."},
        ]
        for i in range(40)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    source = {"type": "hf", "path": str(folder / "chats.jsonl"), "validation_fraction": 0.1}
    config = {"source": source, "task": "sft", "tokenizer": {"vocab_size": 300}, "cache_dir": str(folder / "cache")}
    prepare_data(DataConfig.model_validate(config), folder / "prepared", shard_tokens=400, tell=lambda line: None)
    data = DataConfig.model_validate(
        {"source": {"type": "prepared", "path": str(folder / "prepared")}, "task": "sft", "sequence_length": 64}
    )
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", vocab_size=300, max_position_embeddings=64, **sizes)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    for name in ("whole", "pruned"):
        model.save_pretrained(folder / name)
        build_tokenizer(data).save_pretrained(folder / name)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.zero_()
    return folder, data


def test_what_is_trained_on_is_what_was_chosen(home, tmp_path):
    folder, data = home
    models = {"teacher": folder / "whole", "reference": folder / "pruned"}
    measure_documents(data, tmp_path / "out", **models, device=torch.device("cpu"), tell=lambda line: None)
    choose_documents(data, tmp_path / "out", kept_share=0.5, num_clusters=3, seed=0, tell=lambda line: None)
    chosen = data.model_copy(
        update={"source": data.source.model_copy(update={"scores": str(tmp_path / "out"), "kept_share": 0.5})}
    )
    tokenizer = build_tokenizer(data)
    every, some = (build_train_data(one, tokenizer, seed=0) for one in (data, chosen))
    scores = np.concatenate([np.load(path) for path in sorted((tmp_path / "out" / "domain-0").glob("scores-*.npy"))])
    number = int(np.isfinite(scores).sum())
    assert 3 <= number <= len(scores) // 2
    rows = some.next_rows(some.rows_per_epoch)
    assert int((rows["position_ids"] == 0).sum()) - int((~rows["token_mask"]).any(1).sum()) == number
    assert set(rows["labels"].unique().tolist()) <= set(
        every.next_rows(every.rows_per_epoch)["labels"].unique().tolist()
    )
    assert (rows["labels"] == -100).any()
    assert some.fingerprint != every.fingerprint


def test_features_are_of_answers(home, monkeypatch):
    monkeypatch.setattr("leanmill.evaluate.recovery.scoring._TOKENS_AT_ONCE", 1)  # of two that are asked
    folder, _ = home
    whole, pruned = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("whole", "pruned"))
    ids = np.arange(5, 15)
    targets = np.array([False] * 6 + [True] * 4)
    found = features_of(whole, pruned, [ids], [targets], 8)
    with torch.no_grad():
        inputs = torch.from_numpy(ids[:8])[None]
        p, q = (model(input_ids=inputs).logits[0].double() for model in (whole, pruned))
        hidden = whole(input_ids=inputs, output_hidden_states=True).hidden_states[-1][0]
    assert found.degradation[0] == pytest.approx(float(js_divergence(p[5:7], q[5:7]).mean()), rel=1e-5)
    np.testing.assert_allclose(found.embeddings[0], hidden[:6].double().mean(0), rtol=1e-4, atol=1e-6)
    assert found.lengths.tolist() == [8]


def test_requests_that_do_not_fit(home):
    folder, data = home
    with pytest.raises(ValueError, match="groups are of method: paser"):
        ScoreConfig(teacher_model="a", reference_model="b", num_clusters=3)
    plain = data.model_copy(update={"source": DataConfig().source})
    with pytest.raises(ConfigError, match="data.task: pretrain or sft"):
        measure_documents(
            plain, folder / "no", teacher=folder / "whole", reference=folder / "pruned", device=torch.device("cpu")
        )
