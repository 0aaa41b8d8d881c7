"""A teacher's probabilities on disk: what a folder gives back, what it refuses, and runs that use it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from leanmill.core.errors import ConfigError, RunError
from leanmill.core.row_records import ROWS_PER_FILE
from leanmill.core.rules import StepContext
from leanmill.distill.logits.cache import Contents, Record, TopKCache, open_cache
from leanmill.distill.logits.config import Distill
from leanmill.plan.plan import plan
from leanmill.recipe.root import Recipe
from leanmill.trainer.run import run
from tests.core.tiny import VOCAB_SIZE, context, tiny, tokens
from tests.data.samples import write_jsonl
from tests.distributed import run_ranks


CONTENTS = {
    "data": "d",
    "tokenizer": "t",
    "top_k": 5,
    "temperature": 2.0,
    "sequence_length": 7,
    "vocab_size": 100,
    "teacher": "some/teacher",
    "teacher_weights": "w",
}


def record(seed, length=7, k=5):
    draw = np.random.default_rng(seed)
    log_probs = -draw.random((length, k)).astype(np.float16)
    return Record(draw.integers(0, 100, (length, k)), log_probs, draw.random(length).astype(np.float32))


def assert_same(got, expected):
    for name in ("indices", "log_probs", "log_tail"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))


def test_rows_come_back_whoever_wrote_them(tmp_path):
    rows = [0, 3, ROWS_PER_FILE - 1, ROWS_PER_FILE, 5 * ROWS_PER_FILE + 2]
    for row in rows:
        open_cache(tmp_path / "c", CONTENTS, writes=True).write(row, record(row))
    cache = open_cache(tmp_path / "c", CONTENTS | {"teacher_weights": None}, writes=False)
    for row in rows:
        assert_same(cache.read(row), record(row))
    assert cache.read(1) is None
    assert cache.read(ROWS_PER_FILE + 1) is None
    assert cache.read(9 * ROWS_PER_FILE) is None


@pytest.mark.parametrize("damage", ["cut", "flipped", "moved"])
def test_a_record_that_is_not_whole_is_none(tmp_path, damage):
    cache = open_cache(tmp_path, CONTENTS, writes=True)
    cache.write(0, record(0))
    (path,) = tmp_path.glob("rows-*.bin")
    raw = bytearray(path.read_bytes())
    if damage == "cut":
        raw = raw[:-1]
    elif damage == "flipped":
        raw[40] ^= 1
    else:
        raw = bytearray(len(raw)) + raw
    path.write_bytes(raw)
    assert cache.read(1 if damage == "moved" else 0) is None
    cache.write(0, record(1))
    assert_same(cache.read(0), record(1))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": "e"}, "data d, and this run has e; rows are known by number"),
        ({"tokenizer": "u"}, "tokenizer t, and this run has u"),
        ({"top_k": 6}, "top_k 5, and this run has 6; set distill.top_k"),
        ({"temperature": 1.0}, "temperature 2.0, and this run has 1.0; set distill.temperature"),
        ({"teacher_weights": "v"}, "weights of the teacher w, and this run has v; give another folder"),
    ],
)
def test_logits_of_anything_else_are_refused(tmp_path, changed, message):
    open_cache(tmp_path, CONTENTS, writes=True)
    with pytest.raises(ConfigError, match=message) as error:
        open_cache(tmp_path, CONTENTS | changed, writes=True)
    assert "\n" not in str(error.value)


def test_a_teacher_may_move_as_long_as_its_weights_are_known(tmp_path):
    open_cache(tmp_path, CONTENTS, writes=True)
    open_cache(tmp_path, CONTENTS | {"teacher": "/models/teacher"}, writes=True)
    with pytest.raises(ConfigError, match="teacher some/teacher, and this run has another/teacher"):
        open_cache(tmp_path, CONTENTS | {"teacher": "another/teacher", "teacher_weights": None}, writes=True)


def test_of_two_runs_that_make_it_at_once_the_second_is_refused(tmp_path, monkeypatch):
    open_cache(tmp_path, CONTENTS, writes=True)
    monkeypatch.setattr(Path, "exists", lambda path: False)  # what it saw before the first had written
    with pytest.raises(ConfigError, match="data d, and this run has e"):
        open_cache(tmp_path, CONTENTS | {"data": "e"}, writes=True)
    open_cache(tmp_path, CONTENTS, writes=True)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_student_with_fewer_tokens_is_refused_without_a_teacher_too(tmp_path):
    _, rule = installed(tmp_path, tiny(seed=9))
    changed(rule, batch_of(0))
    offered = context(data_fingerprint="d", vocab_size=VOCAB_SIZE - 1)
    settings = {"top_k": 6, "temperature": 1.5, "cache_dir": str(tmp_path), "divergence": "js"}
    reader = Distill(**settings).install(None, offered).step_rules[0]
    with pytest.raises(ConfigError, match=f"vocab_size {VOCAB_SIZE}, and this run has {VOCAB_SIZE - 1}"):
        changed(reader, batch_of(0))


def test_a_folder_without_logits_and_one_of_another_version(tmp_path):
    with pytest.raises(ConfigError, match=r"no manifest.json.*distill.teacher"):
        open_cache(tmp_path, CONTENTS, writes=False)
    (tmp_path / "manifest.json").write_text(json.dumps({"version": 99}))
    with pytest.raises(ConfigError, match="not a manifest"):
        open_cache(tmp_path, CONTENTS, writes=True)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write cached logits"):
        open_cache(tmp_path / "file", CONTENTS, writes=True)


def test_is_less_than_a_500th_of_all_logits(tmp_path):
    contents = Contents(**CONTENTS | {"top_k": 64, "sequence_length": 2048, "vocab_size": 131_072})
    cache = TopKCache(tmp_path, contents)
    cache.write(0, record(0, 2048, 64))
    (path,) = tmp_path.glob("rows-*.bin")
    assert path.stat().st_size == 2048 * cache.bytes_per_token
    assert cache.bytes_per_token <= 2 * 131_072 / 500  # of bf16


def batch_of(first, num_rows=2):
    ids = tokens(num_rows, 9, seed=first)
    labels = ids.roll(-1, 1).clone()
    labels[:, -2:] = -100
    positions = torch.arange(9).expand_as(ids).contiguous()
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": positions,
        "row_ids": torch.arange(first, first + num_rows),
    }


def installed(folder, model, **settings):
    settings = {"teacher": "t", "top_k": 6, "temperature": 1.5, "cache_dir": str(folder), "divergence": "js"} | settings
    offered = context(model, data_fingerprint="d")
    found = Distill(**settings).install(None, offered)
    return found.loss_terms[0], found.step_rules[0]


def changed(rule, *batches):
    step = StepContext(step=0, num_steps=4, num_micro_batches=len(batches))
    return rule.change_batches(batches, step, None)


@pytest.mark.parametrize("in_head", [True, False])
def test_values_and_gradients_are_those_of_rounded_buckets(tmp_path, in_head):
    teacher, batch = tiny(seed=9), batch_of(4)
    term, rule = installed(tmp_path, teacher)
    changed(rule, batch)
    extras = {name: value.flatten(0, 1) for name, value in term.prepare(batch).items()}
    labels = batch["labels"].flatten()
    student = [torch.randn(n, 16).requires_grad_() for n in (18, VOCAB_SIZE)]
    if in_head:
        found = term.with_cross_entropy((*student, None), labels, extras, cross_entropy_weight=0.0, chunk_tokens=5)[0]
    else:
        found = term(student[0] @ student[1].T, labels, extras)
    logits = teacher(batch["input_ids"]).logits.flatten(0, 1).double() / 1.5
    largest = logits.topk(6).indices
    is_taken = torch.zeros(logits.shape, dtype=torch.bool).scatter(-1, largest, True)

    def buckets(z):
        logs = z.log_softmax(-1)
        return logs.gather(-1, largest), logs.masked_fill(is_taken, -1e9).logsumexp(-1, True)

    taken, tail = buckets(logits)
    p = torch.cat([taken.half().double(), tail], -1).exp()
    exact = [tensor.detach().double().requires_grad_() for tensor in student]
    q = torch.cat(buckets(exact[0] @ exact[1].T / 1.5), -1).exp()
    m = (p + q) / 2
    js = 1.5**2 * (p * (p / m).log() + q * (q / m).log()).sum(-1) / 2
    expected = js[labels != -100].sum()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    found.backward()
    expected.backward()
    for ours, theirs in zip(student, exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-4)


def test_the_teacher_runs_where_rows_are_missing_only(tmp_path):
    teacher, calls = tiny(seed=9), []
    teacher.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    term, rule = installed(tmp_path, teacher)
    first, second, third = (batch_of(n) for n in (0, 2, 4))
    assert changed(rule, first, second)[0] is first
    assert (len(calls), rule.metrics()) == (2, {"share_read": 0.0})
    written = term.prepare(second)
    term, rule = installed(tmp_path, teacher)
    changed(rule, second, third)
    assert (len(calls), rule.metrics()) == (3, {"share_read": 0.5})
    for name, value in term.prepare(second).items():
        assert torch.equal(value, written[name])
    alone, reader = installed(tmp_path, None, teacher=None)
    changed(reader, third)
    assert torch.equal(alone.prepare(third)["teacher_indices"], term.prepare(third)["teacher_indices"])
    with pytest.raises(RunError, match=r"no whole record of row 6; add distill\.teacher"):
        changed(reader, batch_of(6))


def test_ranks_run_the_teacher_together(tmp_path):
    teacher = tiny(seed=9)
    _, rule = installed(tmp_path, teacher)
    changed(rule, batch_of(0), batch_of(2))

    def rank():
        calls = []
        teacher.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
        _, rule = installed(tmp_path, teacher)
        first = 4 * torch.distributed.get_rank()
        changed(rule, batch_of(first), batch_of(first + 2))
        return len(calls), rule.metrics()

    # Rank 0 has its rows and rank 1 misses its own, in both micro-batches.
    assert run_ranks(rank, 2) == [(2, {"share_read": 0.5})] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs a teacher; set distill.teacher"),
        ({"cache_dir": "c"}, "set distill.top_k"),
        ({"cache_dir": "c", "top_k": 4, "divergence": "cakld"}, "asks the teacher"),
    ],
)
def test_what_lacks_something_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        Distill(**settings)


SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def recipe(folder, name, steps, **technique):
    technique = {"type": "distill", "top_k": 8, "cache_dir": str(folder / "logits")} | technique
    return Recipe(
        run_dir=str(folder / name),
        device="cpu",
        model={"config": {"model_type": "llama", "num_key_value_heads": 1, "vocab_size": 300, **SIZES}},
        data={
            "source": {"type": "hf", "path": str(folder / "a.jsonl"), "validation_fraction": 0.3},
            "tokenizer": {"vocab_size": 300},
            "sequence_length": 16,
            "cache_dir": str(folder / "cache"),
        },
        techniques=[technique],
        batch={"tokens_per_step": 64, "tokens_per_micro_batch": 32},
        train={"steps": steps, "precision": "fp32", "deterministic": True},
        eval={"tokens_per_domain": 32},
        checkpoint={"every_steps": 2},
        log={"every_steps": 1, "tensorboard": False, "report": False},
    )


def test_a_run_that_reads_takes_the_steps_of_the_one_that_wrote(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"text {n} and more of it" * 3} for n in range(60)])
    torch.manual_seed(1)
    config = AutoConfig.for_model("llama", vocab_size=300, **SIZES | {"hidden_size": 24})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "teacher")
    writes = recipe(tmp_path, "first", 4, teacher=str(tmp_path / "teacher"))
    run(writes)
    shutil.rmtree(tmp_path / "teacher")
    reads = recipe(tmp_path, "second", 4)
    run(reads)
    assert plan(reads).memory.held.get("teacher", 0) == 0
    told = [_losses(tmp_path / name) for name in ("first", "second")]
    assert told[0] == told[1]
    shutil.rmtree(tmp_path / "second/checkpoints/step-00000004")
    run(reads)
    assert _losses(tmp_path / "second") == told[0]
    other = reads.model_copy(update={"seed": 1, "run_dir": str(tmp_path / "third")})
    with pytest.raises(ConfigError, match=r"distill\.cache_dir .*rows are known by number"):
        run(other)
    with pytest.raises(RunError, match="train for no longer"):
        run(recipe(tmp_path, "fourth", 5))


def _losses(run_dir: Path):
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["losses"] for record in records if record["kind"] == "step"}
