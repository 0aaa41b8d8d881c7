"""Prepared data gives the rows that its text gives, however often the preparation was ended; and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch

from leanmill.cli.main import main
from leanmill.core.errors import ConfigError
from leanmill.data.build import build_eval_data, build_tokenizer, build_train_data
from leanmill.data.config import DataConfig
from leanmill.data.prepare import prepare_data
from leanmill.data.prepared import Shards, open_prepared
from tests.data.samples import conversations, hf_config, sentences, write_jsonl


ROWS = {
    "pretrain": [{"text": text} for text in sentences(120)],
    "sft": [{"messages": turns} for turns in conversations(60)] + [{"messages": [{"role": "user", "content": "?"}]}],
    "preference": [{"prompt": f"ask {n}", "chosen": f"yes {n} " * (1 + n % 4), "rejected": "no"} for n in range(60)],
}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr("leanmill.data.encoding._BATCH_CHARS", 700)


def text_config(tmp_path, task, tokenizer, **changes):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS[task])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    given = {"tokenizer": {"path": str(tmp_path / "tokenizer")}, "task": task, "sequence_length": 128, **changes}
    return hf_config(path, tmp_path, source={"validation_fraction": 0.2}, **given)


def prepared_config(config, folder):
    raw = config.model_dump() | {"source": {"type": "prepared", "path": str(folder)}, "tokenizer": {}}
    return DataConfig.model_validate(raw)


def prepare(config, folder, **options):
    return prepare_data(config, folder, shard_tokens=400, **{"tell": lambda line: None, **options})


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("task", [*ROWS, "mismatched"])
def test_rows_and_held_out_text_are_those_of_the_text(task, tmp_path, tokenizer):
    changes = {"mismatched_answers": True} if task == "mismatched" else {}
    config = text_config(tmp_path, "preference" if changes else task, tokenizer, **changes)
    found = prepare(config, tmp_path / "prepared")
    assert found.num_shards > 1
    other = prepared_config(config, tmp_path / "prepared")
    (tmp_path / "rows.jsonl").rename(tmp_path / "gone.jsonl")
    theirs = build_train_data(other, build_tokenizer(other), seed=3)
    domain = build_eval_data(other, build_tokenizer(other), tokens_per_domain=256)[0]
    (tmp_path / "gone.jsonl").rename(tmp_path / "rows.jsonl")
    ours = build_train_data(config, tokenizer, seed=3)
    assert theirs.rows_per_epoch == ours.rows_per_epoch
    got, wanted = (data.next_rows(2 * ours.rows_per_epoch) for data in (theirs, ours))
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], value) for name, value in wanted.items())
    assert theirs.state_dict()["identity"]["content"] == ours.state_dict()["identity"]["content"]
    expected = build_eval_data(config, tokenizer, tokens_per_domain=256)[0]
    assert domain.num_bytes == expected.num_bytes
    assert all(torch.equal(domain.rows[name], value) for name, value in expected.rows.items())
    if task == "sft":
        assert theirs.warnings(0) == ours.warnings(0)


def test_other_held_out_text_beside_the_same_training_text_is_not_mistaken_for_it(tmp_path, tokenizer):
    found = []
    for name, first in (("one", 0), ("two", 20)):
        held_out = write_jsonl(tmp_path / f"{name}.jsonl", ROWS["pretrain"][first : first + 20])
        config = text_config(tmp_path, "pretrain", tokenizer)
        source = config.source.model_copy(update={"validation_path": str(held_out), "validation_fraction": 0.0})
        prepare(config.model_copy(update={"source": source}), tmp_path / name)
        other = prepared_config(config, tmp_path / name)
        found.append(build_eval_data(other, build_tokenizer(other), tokens_per_domain=128)[0].rows["input_ids"])
    assert not torch.equal(*found)


class Ended(Exception):
    pass


@pytest.mark.parametrize("task", ["sft", "mismatched"])
def test_an_ended_preparation_goes_on_and_comes_to_the_same(task, tmp_path, tokenizer, monkeypatch):
    config = text_config(tmp_path, "sft", tokenizer)
    if task == "mismatched":  # every pair by itself: the one before it lies in another shard
        config = text_config(tmp_path, "preference", tokenizer, mismatched_answers=True)
        monkeypatch.setattr("leanmill.data.encoding._BATCH_CHARS", 1)
    whole = prepare(config, tmp_path / "whole")
    left = 2

    def tell(line):
        nonlocal left
        left -= 1
        if not left:
            raise Ended

    again = tmp_path / "again"
    with pytest.raises(Ended):
        prepare(config, again, tell=tell)
    (again / "domain-0" / "tokens-00002.bin").write_bytes(b"torn")
    with pytest.raises(ConfigError, match="holds no finished prepared data.*leanmill data prepare"):
        build_train_data(prepared_config(config, again), tokenizer, seed=0)
    assert prepare(config, again).num_kept == 2
    assert files_of(again) == files_of(tmp_path / "whole")
    assert prepare(config, again).num_kept == whole.num_shards  # nothing is left to do


@pytest.mark.parametrize("begun", [".lock", "plan.json.part", "tokenizer.part"])
def test_a_preparation_killed_in_its_first_moments_goes_on(begun, tmp_path, tokenizer, monkeypatch):
    config, out = text_config(tmp_path, "pretrain", tokenizer), tmp_path / "prepared"
    if begun == "tokenizer.part":  # a kill in the middle of writing it

        def torn(self, folder):
            folder.mkdir()
            (folder / "tokenizer_config.json").write_text("{")
            raise Ended

        with monkeypatch.context() as patched:
            patched.setattr(type(build_tokenizer(config)), "save_pretrained", torn)
            with pytest.raises(Ended):
                prepare(config, out)
    else:
        out.mkdir()
        (out / begun).touch()
    prepare(config, out)
    prepare(config, tmp_path / "whole")
    wanted = files_of(tmp_path / "whole")
    assert {path: got for path, got in files_of(out).items() if path in wanted} == wanted


def test_text_that_changed_in_between_is_refused(tmp_path, tokenizer):
    config = text_config(tmp_path, "pretrain", tokenizer)
    prepare(config, tmp_path / "prepared")
    write_jsonl(tmp_path / "rows.jsonl", ROWS["pretrain"][1:])
    with pytest.raises(ConfigError, match="was prepared from other text.*name a new folder"):
        prepare(config, tmp_path / "prepared")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds no prepared data; name a new folder"):
        prepare(config, tmp_path / "notes")


def test_what_does_not_fit_the_run_is_refused(tmp_path, tokenizer):
    config, folder = text_config(tmp_path, "pretrain", tokenizer), tmp_path / "prepared"
    prepare(config, folder)
    other = prepared_config(config, folder)
    with pytest.raises(ConfigError, match=r"prepared for task pretrain.*the recipe has data\.task=sft"):
        build_train_data(other.model_copy(update={"task": "sft"}), tokenizer, seed=0)
    changed = build_tokenizer(other)
    changed.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    with pytest.raises(ConfigError, match="another tokenizer than the run has; remove data.tokenizer"):
        build_train_data(other, changed, seed=0)
    shard = folder / "domain-0" / "tokens-00001.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ConfigError, match=r"tokens-00001\.bin is missing or cut"):
        build_train_data(other, tokenizer, seed=0)
    with pytest.raises(ConfigError, match="is prepared already"):
        prepare(other, tmp_path / "twice")


def test_boundaries_of_documents_are_mapped_and_those_of_older_folders_made(tmp_path, tokenizer):
    config, folder = text_config(tmp_path, "pretrain", tokenizer), tmp_path / "prepared"
    prepare(config, folder)
    key = json.loads((folder / "manifest.json").read_text())["kind"]["tokenizer"]
    other = prepared_config(config, folder)

    def offsets():
        return open_prepared(other.source, other)[0].store(key).offsets

    mapped, path = offsets(), folder / "domain-0" / "offsets.npy"
    assert isinstance(mapped, np.memmap)
    path.rename(tmp_path / "offsets.npy")
    made = offsets()
    assert not isinstance(made, np.memmap)
    assert np.array_equal(made, mapped)
    np.save(path, made[:-1])
    with pytest.raises(ConfigError, match=r"offsets\.npy is missing or cut"):
        offsets()
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"offsets\.npy is missing or cut"):
        offsets()


def test_a_conversation_longer_than_a_row_is_named_by_its_row(tmp_path, tokenizer):
    config, folder = text_config(tmp_path, "sft", tokenizer, sequence_length=24), tmp_path / "prepared"
    prepare(config, folder)
    said = r"row \d+ of .*rows.jsonl.* has \d+ tokens and a row has 24"
    for given in (config, prepared_config(config, folder)):
        with pytest.raises(ConfigError, match=r"row \d+ of .* has \d+ tokens and a row has 24"):
            build_train_data(given, build_tokenizer(given), seed=0)
    with pytest.raises(ConfigError, match=said):
        build_eval_data(config, tokenizer, tokens_per_domain=64)
    stream = config.source.model_copy(update={"streaming": True})
    with pytest.raises(ConfigError, match=said):
        build_train_data(config.model_copy(update={"source": stream}), tokenizer, seed=0).next_rows(4)
    cut = config.model_copy(update={"long_documents": "truncate", "sequence_length": 33})
    warned = " ".join(build_train_data(cut, tokenizer, seed=0).warnings(0))
    assert "whose answer begins after sequence_length are left out, the first is row " in warned


def test_shards_are_one_array():
    whole = np.arange(100, dtype=np.uint16)
    shards = Shards([whole[:7], whole[7:60], whole[60:]])
    index = np.array([[0, 6, 7, 59], [60, 99, 8, 6]])
    assert np.array_equal(shards[index], whole[index])
    assert len(shards) == 100
    assert np.array_equal(np.asarray(shards), whole)


def test_the_command_says_how_to_train_on_it(tmp_path, tokenizer, capsys):
    config = text_config(tmp_path, "pretrain", tokenizer)
    recipe = {"model": {"config": {"model_type": "llama"}}, "train": {"steps": 1}, "data": config.model_dump()}
    recipe |= {"batch": {"tokens_per_step": 128, "tokens_per_micro_batch": 128}, "eval": {"tokens_per_domain": 128}}
    path, out = tmp_path / "recipe.json", str(tmp_path / "prepared")
    path.write_text(json.dumps(recipe))
    assert main(["data", "prepare", str(path), "--out", out, "--shard-tokens", "500"]) == 0
    assert f"data.source={{type: prepared, path: {out}}}" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    source = f"data.source={{type: prepared, path: {out}}}"
    assert main(["data", "preview", str(path), source, "data.tokenizer.path=null", "--rows", "1"]) == 0
    assert "row 0 of step 1" in capsys.readouterr().out
    assert main(["data", "prepare", str(path)]) == 2
    assert "name it: --out" in capsys.readouterr().err
