"""Ranks with other text or another tokenizer are refused on every rank, with one line and no hang."""

from pathlib import Path

import pytest
import torch.distributed as dist

from leanmill.core.errors import ConfigError, RunError
from leanmill.data import corpus
from leanmill.data.agreement import check_ranks_agree, on_every_rank
from leanmill.data.build import build_eval_data, build_tokenizer, build_train_data
from leanmill.data.config import DataConfig, LocalCorpus, TokenizerConfig
from tests.data.samples import hf_config, write_texts
from tests.distributed import run_ranks


def _ask(folders, source, tokenizer_of):
    """Each rank reads its own folder, as a node with its own disk would; returns what it is told."""
    folder = Path(folders[dist.get_rank()])
    config = hf_config(f"{folder}/a.jsonl", folder, source=source, tokenizer=TokenizerConfig(vocab_size=300))
    tokenizer = build_tokenizer(
        config if tokenizer_of is None else hf_config(f"{tokenizer_of}/a.jsonl", folder, tokenizer=config.tokenizer)
    )
    data = build_train_data(config, tokenizer, seed=0)
    domains = build_eval_data(config, tokenizer, tokens_per_domain=64)
    try:
        check_ranks_agree(data.identity, domains)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """Two equal folders and one with other text."""
    import datasets  # noqa: F401 (here and `tokenizer` above: imported once rather than by every rank)

    found = [tmp_path_factory.mktemp(name) for name in ("a", "a_copy", "b")]
    for folder, first in zip(found, (40, 40, 41), strict=True):
        write_texts(folder / "a.jsonl", first)
    return [str(folder) for folder in found]


@pytest.mark.parametrize("streaming", [False, True])
def test_equal_ranks_are_let_through(folders, streaming):
    source = {"streaming": streaming, "validation_fraction": 0.2}
    assert run_ranks(_ask, 2, folders[:2], source, None) == ["", ""]


def test_other_text_trains_another_vocabulary_and_both_are_named(folders):
    a, copy, b = folders
    messages = run_ranks(_ask, 3, [a, b, copy], {"validation_fraction": 0.2}, None)
    assert len(set(messages)) == 1
    assert messages[0].startswith("rank 1 of 3 (on ")
    for part in ("text of 'data'", "held-out text of 'data'", "tokenizer"):
        assert part in messages[0]
    assert "give every machine the same files, recipe and packages" in messages[0]
    assert "\n" not in messages[0]


def test_held_out_text_alone(folders, tmp_path, monkeypatch):
    (first, second) = run_ranks(_ask_with_other_held_out_text, 2, folders[0])
    assert first == second
    assert "other data than the others: held-out text of 'data' differ" in first


def _ask_with_other_held_out_text(folder):
    config = hf_config(f"{folder}/a.jsonl", Path(folder), source={"validation_fraction": 0.2})
    tokenizer = build_tokenizer(config)
    data = build_train_data(config, tokenizer, seed=0)
    domains = build_eval_data(config, tokenizer, tokens_per_domain=64)
    domains[0].rows["labels"][0, 3] += dist.get_rank()
    with pytest.raises(ConfigError) as caught:
        check_ranks_agree(data.identity, domains)
    return str(caught.value)


def test_a_tokenizer_of_equal_size_alone(folders):
    messages = run_ranks(_ask_with_own_tokenizer, 2, folders)
    assert len(set(messages)) == 1
    assert "rank 1 of 2" in messages[0]
    assert ": tokenizer differ;" in messages[0]


def _ask_with_own_tokenizer(folders):
    import torch

    from leanmill.data.identity import data_identity
    from leanmill.data.tokenizer import tokenizer_fingerprint

    rank = dist.get_rank()
    folder = folders[2 * rank]
    config = hf_config(f"{folder}/a.jsonl", Path(folder), tokenizer=TokenizerConfig(vocab_size=300))
    tokenizer = build_tokenizer(config)
    assert len(tokenizer) == 300
    identity = data_identity(config, seed=0, content={"tokenizer": tokenizer_fingerprint(tokenizer)})
    with pytest.raises(ConfigError) as caught:
        check_ranks_agree(identity, [])
    # The group is usable afterwards: nobody is left inside a collective.
    dist.all_reduce(torch.ones(1))
    return str(caught.value)


def _read_installation(roots):
    """Each rank has the packages of its own machine."""
    root = roots[dist.get_rank()]
    corpus._installation = lambda: (f"{root}/lib", [f"{root}/packages"])
    source = LocalCorpus(domains={"python": 1.0}, validation_fraction=0.3)
    config = DataConfig(
        source=source, tokenizer=TokenizerConfig(vocab_size=300), sequence_length=32, cache_dir=f"{root}/cache"
    )
    tokenizer = build_tokenizer(config)
    try:
        check_ranks_agree(build_train_data(config, tokenizer, seed=0).identity, [])
    except ConfigError as error:
        return str(error), len(tokenizer)
    return "", len(tokenizer)


def test_other_packages_under_the_local_corpus(tmp_path):
    for machine, package in (("one", "alpha"), ("two", "beta")):
        for folder in ("lib", f"packages/{package}"):
            (tmp_path / machine / folder).mkdir(parents=True)
        for n in range(40):
            (tmp_path / machine / "lib" / f"m{n}.py").write_text(f"def same_{n}(first, second): return first * {n}\n")
            text = f"class {package.title()}{n}: {package}_{n} = '{package} {package} number {n}'\n"
            (tmp_path / machine / "packages" / package / f"m{n}.py").write_text(text)
    (first, size), (second, other_size) = run_ranks(_read_installation, 2, [tmp_path / "one", tmp_path / "two"])
    assert size == other_size == 300
    assert first == second
    assert "rank 1 of 2 " in first
    assert "text of 'python', tokenizer differ; give every machine the same files, recipe and packages" in first


def _fail(failing, kind):
    def build():
        if dist.get_rank() in failing:
            raise kind("no text; give some")
        return "built"

    with pytest.raises(kind) as caught:
        on_every_rank(build)
    return str(caught.value)


@pytest.mark.parametrize("kind", [ConfigError, RunError])
def test_a_failure_on_some_ranks_is_one_on_all(kind):
    (first, second, third) = run_ranks(_fail, 3, [1, 2], kind)
    assert first == second == third
    assert first.startswith("ranks 1, 2 of 3 (on ")
    assert first.endswith("): no text; give some")


def test_a_failure_on_all_ranks_names_none():
    assert run_ranks(_fail, 2, [0, 1], ConfigError) == ["no text; give some"] * 2


def test_what_every_rank_builds_is_returned():
    assert run_ranks(lambda: on_every_rank(dist.get_rank), 2) == [0, 1]
    with pytest.raises(ZeroDivisionError):
        on_every_rank(lambda: 1 // 0)


def test_one_process_has_nobody_to_differ_from(tokenizer, tmp_path):
    config = hf_config(write_texts(tmp_path / "a.jsonl", 3), tmp_path)
    check_ranks_agree(build_train_data(config, tokenizer, seed=0).identity, [])
