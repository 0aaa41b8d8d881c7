"""Every setting that may change the rows is compared on resume, a new one by default."""

import typing

import pytest

from leanmill.core.errors import ConfigError
from leanmill.data.build import build_train_data
from leanmill.data.cache import fingerprint
from leanmill.data.config import DataConfig, HfDataset, LocalCorpus, MaskingConfig, Mixture, Prepared, SubsetConfig
from leanmill.data.identity import HARMLESS, MOVABLE, data_identity
from tests.data.samples import hf_config, write_texts


HF = HfDataset(
    path="a.jsonl", subset="s", validation_split="test", validation_path="v.jsonl", first_field="a", second_field="b"
)
OTHERS = {
    "type": None,
    "format": "text",
    "row_format": "alpaca",
    "task": "sft",
    "source": LocalCorpus(),
    "domains": {"cpp": 1.0},
    "draw": "once",
}
"""Where another value of the same kind is not allowed."""


def identity(config, seed=0):
    return data_identity(config, seed=seed, content={"tokenizer": "t"})


def other(name, value):
    if name in OTHERS:
        return OTHERS[name]
    if isinstance(value, bool):
        return not value
    return value / 2 if isinstance(value, float) else value + 1 if isinstance(value, int) else f"{value}x"


def cases():
    mixture = Mixture(sources=[HF])
    for owner, key, build in (
        (DataConfig(source=HF), "data.", lambda c: c),
        (HF, "data.source.", lambda c: DataConfig(source=c)),
        (LocalCorpus(), "data.source.", lambda c: DataConfig(source=c)),
        (MaskingConfig(), "data.masking.", lambda c: DataConfig(masking=c)),
        (SubsetConfig(share=0.5), "data.subset.", lambda c: DataConfig(source=HF, subset=c)),
        (Prepared(path="p", scores="s", kept_share=0.25), "data.source.", lambda c: DataConfig(source=c)),
        (HF, "data.source.sources.0.", lambda c: DataConfig(source=mixture.model_copy(update={"sources": [c]}))),
    ):
        for name in type(owner).model_fields:
            free = HARMLESS.get(type(owner), frozenset()) | MOVABLE.get(type(owner), frozenset())
            if name in free or name in ("type", "masking") or (name == "subset" and isinstance(owner, DataConfig)):
                continue  # subset: fields of its own, below
            yield pytest.param(owner, name, key, build, id=f"{key}{type(owner).__name__}.{name}")


@pytest.mark.parametrize(("owner", "name", "key", "build"), cases())
def test_any_changed_setting_is_refused_by_name_with_what_to_type(owner, name, key, build):
    before, after = build(owner), build(owner.model_copy(update={name: other(name, getattr(owner, name))}))
    with pytest.raises(ConfigError, match="trained on other data") as caught:
        identity(after).check(identity(before).state())
    message = str(caught.value)
    assert identity(after).fingerprint != identity(before).fingerprint
    assert f"{key}{name}{'.type' if name == 'source' else ''} (checkpoint " in message
    # What becomes of long documents follows the task.
    assert message.count("(checkpoint") == (2 if name == "task" else 1)
    assert "\n" not in message
    if name != "source":
        value = getattr(owner, name)
        typed = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
        assert f"type '{key}{name}={{" in message or f"type {key}{name}={typed} " in message
    identity(before).check(identity(before).state())


def test_harmless_fields_exist_and_are_few():
    for owner, names in HARMLESS.items():
        assert names <= set(owner.model_fields)
    assert sum(map(len, HARMLESS.values())) == 6


def test_harmless_fields_may_change():
    config = DataConfig(source=HF)
    changes = {"cache_dir": "/elsewhere", "long_documents": "split", "source": HF.model_copy(update={"path": "b"})}
    changes["tokenizer"] = config.tokenizer.model_copy(update={"path": "runs/run/tokenizer"})
    identity(config.model_copy(update=changes)).check(identity(config).state())


def test_a_validation_file_may_move_and_is_known_by_what_it_holds(tokenizer, tmp_path):
    def build(name, texts, train=60):
        held_out = None if texts is None else write_texts(tmp_path / name, texts)
        path = write_texts(tmp_path / "train.jsonl", train)
        return build_train_data(hf_config(path, tmp_path, source={"validation_path": held_out}), tokenizer, seed=0)

    saved = build("held-out.jsonl", 5)
    moved = build("moved.jsonl", 5)
    assert moved.fingerprint == saved.fingerprint
    moved.load_state_dict(saved.state_dict())
    with pytest.raises(
        ConfigError, match=r"held-out text of 'data' \(checkpoint \w+, recipe \w+\) differ; restore the text"
    ):
        build("other.jsonl", 6).load_state_dict(saved.state_dict())
    without = build("", None)
    assert without.fingerprint != saved.fingerprint
    with pytest.raises(ConfigError, match=r"type data\.source\.validation_path=\S+held-out\.jsonl to go on"):
        without.load_state_dict(saved.state_dict())
    before = saved.state_dict()
    del before["identity"]["held_out"]  # as it was written when files were known by their path
    moved.load_state_dict(before)


def test_a_field_that_did_not_exist_yet_had_its_default():
    class Later(HfDataset):
        sampling: int = 3
        """New."""

    config = DataConfig(source=HF)
    for sampling in (3, 4):
        source = Later.model_construct(**dict(HF), sampling=sampling)
        later = identity(config.model_copy(update={"source": source}))
        if sampling == 3:
            later.check(identity(config).state())
        else:
            with pytest.raises(ConfigError, match=r"data\.source\.sampling=3 to go on"):
                later.check(identity(config).state())


def test_the_order_of_domains_and_sources_counts():
    first, second = (
        DataConfig(source=LocalCorpus(domains=d)) for d in ({"cpp": 1, "python": 1}, {"python": 1, "cpp": 1})
    )
    with pytest.raises(ConfigError, match=r"'data\.source\.domains=\{cpp: 1\.0, python: 1\.0\}'"):
        identity(second).check(identity(first).state())
    a, b = (HfDataset(path="p", name=name) for name in "ab")
    first, second = (DataConfig(source=Mixture(sources=s)) for s in ([a, b], [b, a]))
    with pytest.raises(ConfigError, match=r"sources\.0\.name=a data\.source\.sources\.1\.name=b to go on"):
        identity(second).check(identity(first).state())


def test_one_source_more_is_one_difference():
    first, second = HF, HF.model_copy(update={"name": "more"})
    before, after = (DataConfig(source=Mixture(sources=s)) for s in ([first], [first, second]))
    with pytest.raises(ConfigError, match=r"data\.source\.sources\.1\.type \(checkpoint none, recipe hf\) differ"):
        identity(after).check(identity(before).state())


def test_another_kind_of_source_is_one_difference():
    with pytest.raises(
        ConfigError, match=r"data\.source\.type \(checkpoint hf, recipe local_corpus\) differ"
    ) as caught:
        identity(DataConfig()).check(identity(DataConfig(source=HF)).state())
    assert "as in the recipe.yaml of the run" in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"validation_fraction": 0.4}, {"validation_split": "train"}, {"shuffle_buffer": 7}, {"format": "json"}],
    ids=str,
)
def test_a_stream_does_not_resume_with_other_settings(tokenizer, tmp_path, change):
    settings = {"streaming": True, "validation_fraction": 0.1, "shuffle_buffer": 5}
    path = write_texts(tmp_path / "train.jsonl", 60)
    saved = build_train_data(hf_config(path, tmp_path, source=settings), tokenizer, seed=0)
    saved.next_rows(3)
    resumed = build_train_data(hf_config(path, tmp_path, source={**settings, **change}), tokenizer, seed=0)
    with pytest.raises(ConfigError, match=rf"type data\.source\.{next(iter(change))}=\S+ to go on"):
        resumed.load_state_dict(saved.state_dict())


def test_a_hub_stream_does_not_resume_with_another_shuffle_buffer(monkeypatch, tokenizer, tmp_path):
    import datasets

    class Builder:
        hash = "h"

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args: Builder)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.IterableDataset.from_generator(rows))

    def rows():
        yield from ({"text": f"text {n}"} for n in range(40))

    def build(shuffle_buffer):
        source = {"streaming": True, "shuffle_buffer": shuffle_buffer}
        return build_train_data(hf_config("owner/name", tmp_path, source=source), tokenizer, seed=0)

    saved = build(5)
    assert saved.state_dict()["identity"]["content"]["text of 'data'"] == fingerprint(["owner/name", "h"])
    saved.next_rows(2)
    build(5).load_state_dict(saved.state_dict())
    with pytest.raises(ConfigError, match=r"data\.source\.shuffle_buffer=5 to go on"):
        build(6).load_state_dict(saved.state_dict())


def test_every_field_of_every_source_is_walked():
    """A fourth kind of source must join the walk above."""
    kinds = typing.get_args(typing.get_args(DataConfig.model_fields["source"].annotation)[0])
    assert set(kinds or typing.get_args(DataConfig.model_fields["source"].annotation)) == {
        LocalCorpus,
        HfDataset,
        Prepared,
        Mixture,
    }
