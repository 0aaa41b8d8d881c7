"""A run and its data: what is said at its start, and what may not change before a resume."""

import re

import pytest
import torch.distributed as dist

from leanmill.core.errors import ConfigError
from leanmill.recipe.io import load_recipe
from leanmill.recipe.root import Recipe
from leanmill.report.records import read_records
from leanmill.trainer.run import run
from tests.data.samples import write_jsonl, write_texts
from tests.distributed import run_ranks


SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def recipe(folder, run_dir=None, **source):
    return Recipe(
        run_dir=str(run_dir or folder / "run"),
        device="cpu",
        model={"config": {"model_type": "llama", "num_key_value_heads": 1, **SIZES}},
        data={
            "source": {"type": "hf", "path": str(folder / "a.jsonl"), "validation_fraction": 0.3, **source},
            "tokenizer": {"vocab_size": 300},
            "sequence_length": 16,
            "cache_dir": str(folder / "cache"),
        },
        batch={"tokens_per_step": 64, "tokens_per_micro_batch": 32},
        train={"steps": 2, "precision": "fp32"},
        eval={"tokens_per_domain": 32},
        log={"tensorboard": False, "report": False},
    )


def test_other_data_is_the_reason_given_also_where_the_vocabulary_changes_with_it(tmp_path, capfd):
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"text {n}"} for n in range(30)] + [{"text": ""}])
    run(recipe(tmp_path))
    shown = " ".join(capfd.readouterr().err.split())
    assert "rows: 31 read, " in shown
    assert "WARNING: 1 of 31 rows of 'data' without text are left out" in shown
    with pytest.raises(ConfigError, match=r"type data\.source\.validation_fraction=0\.3 to go on") as caught:
        run(recipe(tmp_path, validation_fraction=0.2))
    assert "\n" not in str(caught.value)


def test_epochs_end_where_the_data_was_seen_so_often_and_resume_as_tokens(tmp_path, capfd):
    write_texts(tmp_path / "a.jsonl", 40)
    twice = recipe(tmp_path)
    twice = twice.model_copy(update={"train": twice.train.model_copy(update={"steps": None, "epochs": 2.0})})
    result = run(twice)
    saved = load_recipe(tmp_path / "run" / "recipe.yaml").train
    assert saved.epochs is None
    tokens_per_epoch = saved.total_tokens / 2
    assert 0 <= result.step * 64 - saved.total_tokens < 64
    assert (
        f"{result.step} steps of 64 tokens, {result.step * 64 / tokens_per_epoch:.3g} passes" in capfd.readouterr().err
    )
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [r["epoch"] for r in records if r["kind"] == "step"][-1] == result.step * 64 / tokens_per_epoch
    assert run(twice).step == result.step  # there is nothing left to do


def _start_on_own_disk(folders):
    rank = dist.get_rank()
    try:
        run(recipe(folders[rank], run_dir=folders[0] / "run"))
    except ConfigError as error:
        return str(error)
    return "trained"


def test_a_file_that_one_machine_lacks_ends_all_ranks_with_one_line(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    write_texts(folders[0] / "a.jsonl", 40)
    messages = run_ranks(_start_on_own_disk, 2, folders, timeout_seconds=60)
    assert messages[0] == messages[1]
    assert re.match(r"rank 1 of 2 \(on \S+\): data\.source\.path: no file or folder '.*b/a\.jsonl'; ", messages[0])


def test_ranks_with_other_files_do_not_start(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, count in zip(folders, (40, 50), strict=True):
        folder.mkdir()
        write_texts(folder / "a.jsonl", count)
    messages = run_ranks(_start_on_own_disk, 2, folders)
    assert messages[0] == messages[1]
    assert messages[0].startswith("rank 1 of 2 (on ")
    assert "text of 'data'" in messages[0]
    assert not (folders[0] / "run" / "checkpoints").exists()
