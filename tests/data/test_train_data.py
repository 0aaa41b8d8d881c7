"""One global order of rows, whatever the ranks, the batch and the interruptions."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leanmill.core.errors import ConfigError
from leanmill.data.build import build_train_data
from leanmill.data.config import DataConfig, HfDataset, Mixture
from tests.data.samples import conversations, hf_config, sentences, write_jsonl, write_texts


NUM_ROWS = 48
KINDS = ["map", "stream", "map_whole", "stream_whole", "sft", "sft_stream", "mixture"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_texts(folder / "a.jsonl", 37)
    write_texts(folder / "b.jsonl", 11)
    write_jsonl(folder / "chat.jsonl", [{"messages": c} for c in conversations(19)])
    return folder


def config_of(kind, folder):
    stream = {"streaming": True, "shuffle_buffer": 5} if "stream" in kind else {}
    if kind == "mixture":
        sources = [
            HfDataset(name="a", path=str(folder / "a.jsonl"), weight=3, validation_fraction=0),
            HfDataset(name="b", path=str(folder / "b.jsonl"), streaming=True, shuffle_buffer=4, validation_fraction=0),
        ]
        return DataConfig(source=Mixture(sources=sources), sequence_length=32, cache_dir=str(folder / "cache"))
    if kind.startswith("sft"):
        return hf_config(str(folder / "chat.jsonl"), folder, source=stream, task="sft", sequence_length=128)
    whole = {"long_documents": "truncate"} if "whole" in kind else {}
    return hf_config(str(folder / "a.jsonl"), folder, source=stream, **whole)


@pytest.fixture(scope="module")
def uninterrupted(folder, tokenizer):
    """The first rows of every kind of data, read one by one."""
    found = {}
    for kind in KINDS:
        data = build_train_data(config_of(kind, folder), tokenizer, seed=5)
        rows = [data.next_rows(1) for _ in range(NUM_ROWS)]
        found[kind] = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    return found


# (ranks, rows a rank, steps) of one stretch of a run, which ends with a checkpoint.
STRETCH = st.tuples(st.sampled_from([1, 2, 3, 4]), st.integers(1, 3), st.integers(1, 3))


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stretches=st.lists(STRETCH, min_size=1, max_size=4))
def test_rows_are_the_same_through_any_ranks_batches_and_resumes(folder, tokenizer, uninterrupted, kind, stretches):
    state, got = None, []
    for world_size, rows_a_rank, steps in stretches:
        ranks = [build_train_data(config_of(kind, folder), tokenizer, seed=5) for _ in range(world_size)]
        if state is not None:
            for data in ranks:
                data.load_state_dict(state)
        for _ in range(steps):
            share = [
                data.next_rows(rows_a_rank * world_size, rank=rank, world_size=world_size)
                for rank, data in enumerate(ranks)
            ]
            got += share
        states = [json.loads(json.dumps(data.state_dict())) for data in ranks]
        assert all(other == states[0] for other in states)
        state = states[0]
        if sum(len(b["labels"]) for b in got) > NUM_ROWS:
            break
    for name, expected in uninterrupted[kind].items():
        rows = torch.cat([batch[name] for batch in got])[:NUM_ROWS]
        assert torch.equal(rows, expected[: len(rows)])


def test_two_then_one_then_four_ranks(folder, tokenizer, uninterrupted):
    for kind in KINDS:
        state, got = None, []
        for world_size in (2, 1, 4):
            ranks = [build_train_data(config_of(kind, folder), tokenizer, seed=5) for _ in range(world_size)]
            for data in ranks:
                if state is not None:
                    data.load_state_dict(state)
            got += [data.next_rows(16, rank=r, world_size=world_size)["input_ids"] for r, data in enumerate(ranks)]
            state = ranks[0].state_dict()
        assert torch.equal(torch.cat(got), uninterrupted[kind]["input_ids"])


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_types_and_position(folder, tokenizer, kind):
    config = config_of(kind, folder)
    data = build_train_data(config, tokenizer, seed=0)
    batch = data.next_rows(6, rank=1, world_size=2)
    assert ("token_mask" in batch) == ("whole" in kind or kind.startswith("sft")), "what is split is never padded"
    is_token = batch.pop("token_mask", torch.ones(3, config.sequence_length, dtype=torch.bool))
    assert is_token.dtype == torch.bool
    assert set(batch) == {"input_ids", "labels", "position_ids", "row_ids"}
    assert batch.pop("row_ids").tolist() == [3, 4, 5]
    assert all(t.shape == (3, config.sequence_length) and t.dtype == torch.int64 for t in batch.values())
    assert data.position_tokens == 6 * config.sequence_length
    assert (batch["labels"] != -100).any()
    assert batch["input_ids"].max() < len(tokenizer)
    assert (batch["labels"][~is_token] == -100).all()
    assert batch["input_ids"][~is_token].unique().numel() <= 1


def test_padding_is_told_apart_from_prompts_and_ends_of_documents(folder, tokenizer):
    batch = build_train_data(config_of("sft_map", folder), tokenizer, seed=0).next_rows(8)
    is_token, positions = batch["token_mask"], batch["position_ids"]
    assert (is_token & (batch["labels"] == -100)).any(), "prompts"
    assert not is_token.all()
    for row in range(8):
        num_tokens = int(is_token[row].sum())
        assert is_token[row, :num_tokens].all(), "padding comes last"
        assert num_tokens == 128 or positions[row, num_tokens] == 0, "and is a document of its own"


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_labels_are_the_next_tokens_within_documents(uninterrupted, kind):
    rows = uninterrupted[kind]
    ids, labels, positions = (rows[name].numpy() for name in ("input_ids", "labels", "position_ids"))
    same_document = positions[:, 1:] == positions[:, :-1] + 1
    assert (labels[:, :-1][same_document] == ids[:, 1:][same_document]).all()
    assert (labels[:, :-1][~same_document] == -100).all()
    # The end of text is predicted and is the last token of its document; it predicts nothing itself.
    assert (labels[ids == 0] == -100).all()
    assert (labels == 0).any()
    # A document that continues in the next row keeps its target at the cut.
    cut = labels[:-1, -1] != -100
    assert cut.any()
    if kind == "stream":  # indexed rows are shuffled, so the next row is another document's
        assert (labels[:-1, -1][cut] == ids[1:, 0][cut]).all()


def test_an_epoch_holds_every_document_once(folder, tokenizer, uninterrupted):
    from leanmill.data.encoding import Encoder

    documents = [tuple(e.ids.tolist()) for e in Encoder(tokenizer, "pretrain").encode(sentences(37))]
    data = build_train_data(config_of("stream", folder), tokenizer, seed=5)
    total = sum(map(len, documents))
    num_rows = -(-2 * total // 32)
    stream = data.next_rows(num_rows)["input_ids"].flatten().tolist()
    orders = []
    for epoch in range(2):
        part, found = stream[epoch * total : (epoch + 1) * total], []
        ends = [i + 1 for i, token in enumerate(part) if token == 0]
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            found.append(tuple(part[start:end]))
        assert sorted(found) == sorted(documents)
        orders.append(found)
    assert orders[0] != orders[1]
    assert orders[0] != documents


def test_every_token_of_an_epoch_is_read_once_through_restarts(folder, tokenizer):
    """On 1, 2, 3 and 4 ranks, each going on from the checkpoint of the one before, at another batch size."""
    from leanmill.data.encoding import Encoder

    documents = [tuple(e.ids.tolist()) for e in Encoder(tokenizer, "pretrain").encode(sentences(37))]
    total, state, stream = sum(map(len, documents)), None, []
    for world_size, rows_a_rank in ((1, 5), (2, 1), (3, 2), (4, 3)):
        ranks = [build_train_data(config_of("stream", folder), tokenizer, seed=5) for _ in range(world_size)]
        for data in ranks:
            if state is not None:
                data.load_state_dict(json.loads(json.dumps(state)))
        while len(stream) < total * world_size / 4:
            for rank, data in enumerate(ranks):
                rows = data.next_rows(rows_a_rank * world_size, rank=rank, world_size=world_size)
                stream += rows["input_ids"].flatten().tolist()
        state = ranks[0].state_dict()
        assert state["position_tokens"] == len(stream)
    epoch = stream[:total]
    ends = [i + 1 for i, token in enumerate(epoch) if token == 0]
    found = [tuple(epoch[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    assert sorted(found) == sorted(documents)


def test_sft_rows_hold_whole_conversations_and_predict_answers_only(uninterrupted, tokenizer):
    for kind in ("sft", "sft_stream"):
        rows = uninterrupted[kind]
        columns = (rows[name].tolist() for name in ("input_ids", "labels", "position_ids"))
        for ids, labels, positions in zip(*columns, strict=True):
            starts = [t for t, p in enumerate(positions) if p == 0]
            for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
                text = tokenizer.decode(ids[start:end])
                answers = [t for t in labels[start:end] if t != -100]
                if not answers:
                    assert set(ids[start:end]) == {0}  # padding
                    continue
                assert text.startswith(("<|system|>", "<|user|>"))
                assert text.endswith("<|endoftext|>")
                expected = "".join(p.split("<|user|>")[0] for p in text.split("<|assistant|>")[1:])
                assert tokenizer.decode(answers) == expected


def test_seed_changes_the_order(folder, tokenizer, uninterrupted):
    for kind in ("map", "stream", "sft"):
        other = build_train_data(config_of(kind, folder), tokenizer, seed=6).next_rows(NUM_ROWS)
        assert not torch.equal(other["input_ids"], uninterrupted[kind]["input_ids"])


def test_document_mask_off_predicts_across_documents(folder, tokenizer):
    config = config_of("map", folder).model_copy(update={"document_mask": False})
    batch = build_train_data(config, tokenizer, seed=0).next_rows(8)
    assert (batch["labels"] != -100).all()
    assert torch.equal(batch["labels"][:, :-1], batch["input_ids"][:, 1:])
    assert torch.equal(batch["position_ids"], torch.arange(32).expand(8, 32))


def test_mixture_rows_come_whole_from_one_source(folder, tokenizer):
    data = build_train_data(config_of("mixture", folder), tokenizer, seed=0)
    data.next_rows(40)
    assert data.state_dict()["rows"] == {"a": 30, "b": 10}


def test_rows_that_do_not_divide_are_refused(folder, tokenizer):
    data = build_train_data(config_of("map", folder), tokenizer, seed=0)
    with pytest.raises(ConfigError, match="5 rows of 32 tokens cannot be shared by 2 ranks"):
        data.next_rows(5, rank=0, world_size=2)


def _change_text(folder, config):
    write_texts(folder / "c.jsonl", 36)
    return config.model_copy(update={"source": config.source.model_copy(update={"path": str(folder / "c.jsonl")})})


@pytest.mark.parametrize(
    ("what", "change", "seed"),
    [
        ("seed (checkpoint 5, recipe 7)", lambda folder, config: config, 7),
        ("sequence_length (checkpoint 32, recipe 16)", lambda _, c: c.model_copy(update={"sequence_length": 16}), 5),
        ("document_mask", lambda _, c: c.model_copy(update={"document_mask": False}), 5),
        ("long_documents", lambda _, c: c.model_copy(update={"long_documents": "truncate"}), 5),
        ("text of 'data'", _change_text, 5),
    ],
)
def test_a_checkpoint_of_other_data_says_what_differs(folder, tokenizer, what, change, seed):
    config = config_of("map", folder)
    saved = build_train_data(config, tokenizer, seed=5)
    other = build_train_data(change(folder, config), tokenizer, seed=seed)
    assert saved.fingerprint != other.fingerprint
    with pytest.raises(ConfigError, match="trained on other data") as caught:
        other.load_state_dict(saved.state_dict())
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("(checkpoint") == 1


def test_another_tokenizer_is_noticed(folder, tokenizer, tmp_path):
    from leanmill.data.config import TokenizerConfig
    from leanmill.data.tokenizer import trained_tokenizer

    config = TokenizerConfig(vocab_size=300)
    other = trained_tokenizer(config, text_key="x", texts=lambda: ["abc abc"] * 9, root=tmp_path)
    saved = build_train_data(config_of("map", folder), tokenizer, seed=0)
    with pytest.raises(ConfigError, match=r": tokenizer \(checkpoint"):
        build_train_data(config_of("map", folder), other, seed=0).load_state_dict(saved.state_dict())


def test_the_fingerprint_survives_a_copy_of_the_files(folder, tokenizer, tmp_path):
    for kind in ("map", "stream"):
        config = config_of(kind, folder)
        write_texts(tmp_path / "a.jsonl", 37)
        copied = config.source.model_copy(update={"path": str(tmp_path / "a.jsonl")})
        copied = config.model_copy(update={"source": copied, "cache_dir": str(tmp_path / "cache")})
        first, second = (build_train_data(c, tokenizer, seed=0).fingerprint for c in (config, copied))
        assert first == second


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("rows", [[], [{"text": " "}]])
def test_empty_data_is_one_line(tokenizer, tmp_path, rows, streaming):
    config = hf_config(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path, source={"streaming": streaming})
    with pytest.raises(ConfigError, match="empty") as caught:
        build_train_data(config, tokenizer, seed=0).next_rows(1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_conversations_without_answers(tokenizer, tmp_path, streaming):
    question = {"messages": [{"role": "user", "content": "why?"}]}
    path = write_jsonl(tmp_path / "a.jsonl", [question, {"messages": conversations(1)[0]}, question])
    source = {"streaming": streaming}
    config = hf_config(path, tmp_path, source=source, task="sft", sequence_length=128)
    data = build_train_data(config, tokenizer, seed=0)
    labels = data.next_rows(2)["labels"]
    assert ((labels != -100).sum(1) > 0).all()
    if not streaming:
        assert "rows: 3 read, 2 without an assistant turn" in data.describe()
    config = hf_config(write_jsonl(tmp_path / "b.jsonl", [question]), tmp_path, source=source, task="sft")
    with pytest.raises(
        ConfigError,
        match=r"1 without an assistant turn; the first is row 1 of .*b\.jsonl\); add a turn with role assistant",
    ):
        build_train_data(config, tokenizer, seed=0).next_rows(1)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("task", ["pretrain", "sft"])
def test_long_documents(tokenizer, tmp_path, streaming, task):
    chat = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "because " * 50}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "mill " * 99, "messages": chat}])
    settings = {"source": {"streaming": streaming}, "task": task, "sequence_length": 16}
    with pytest.raises(ConfigError, match=r"tokens and a row has 16; raise data.sequence_length or set data.long_doc"):
        build_train_data(hf_config(path, tmp_path, **settings, long_documents="error"), tokenizer, seed=0).next_rows(1)
    data = build_train_data(hf_config(path, tmp_path, **settings, long_documents="truncate"), tokenizer, seed=0)
    first, second = data.next_rows(1), data.next_rows(1)
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert first["position_ids"].tolist() == [list(range(16))]
    assert first["labels"][0, -1] == -100


def test_the_data_line_counts_rows_files_tokens_and_passes(tokenizer, tmp_path):
    rows = [{"text": text} for text in (*sentences(6), "", None)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.csv").write_text("text\n")
    data = build_train_data(hf_config(str(tmp_path), tmp_path, cache_dir=str(tmp_path / ".c")), tokenizer, seed=0)
    num_rows = sum(len(tokenizer(text)["input_ids"]) + 1 for text in sentences(6)) // 32
    line = data.describe(num_rows * 50)
    assert "6 documents, " in line
    assert "; rows: 8 read, 2 without text; files read: 1 .jsonl; files ignored: 1 .csv; 50 passes)" in line
    files, left_out, passes = data.warnings(num_rows * 50)
    assert files.startswith("1 .csv in ")
    assert left_out.startswith(
        f"2 of 8 rows of 'data' without text are left out, the first is row 7 of {tmp_path}/a.jsonl"
    )
    assert passes.startswith("'data' is trained for 50 passes")
    assert "train.total_tokens" in passes
    assert len(data.warnings(num_rows * 30)) == 2
    # The same counts from the cache.
    again = build_train_data(hf_config(str(tmp_path), tmp_path, cache_dir=str(tmp_path / ".c")), tokenizer, seed=0)
    assert again.describe(num_rows * 50) == line


def test_truncated_conversations_are_counted(tokenizer, tmp_path):
    far = [{"role": "user", "content": "why " * 50}, {"role": "assistant", "content": "so"}]
    near = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": c} for c in (far, near, far)])
    config = hf_config(path, tmp_path, task="sft", sequence_length=16, long_documents="truncate")
    data = build_train_data(config, tokenizer, seed=0)
    assert "rows: 3 read, 2 whose answer begins after sequence_length;" in data.describe()
    (warning,) = data.warnings(1)
    assert "raise data.sequence_length" in warning


def test_a_stream_says_once_what_it_leaves_out(tokenizer, tmp_path, caplog):
    rows = [{"text": text} for text in ("a b c", "", "d e f", None)] * 9
    config = hf_config(
        write_jsonl(tmp_path / "a.jsonl", rows), tmp_path, source={"streaming": True, "shuffle_buffer": 4}
    )
    data = build_train_data(config, tokenizer, seed=0)
    data.next_rows(40)
    # Other tests of the worker may have set the level at which our logger speaks, and other libraries speak too.
    (record,) = (record for record in caplog.records if record.name.startswith("leanmill") and record.levelno >= 30)
    assert f"without text are left out, the first is row 2 of {tmp_path}/a.jsonl; fill column 'text'" in record.message
    assert data.warnings(10**9) == []


def test_a_stream_says_when_it_repeats_itself_too_often(tokenizer, tmp_path, caplog):
    caplog.set_level("INFO", logger="leanmill")
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "mill " * 20}])
    data = build_train_data(hf_config(path, tmp_path, source={"streaming": True}), tokenizer, seed=0)
    data.next_rows(60)
    first, warning = (record.message for record in caplog.records if record.name.startswith("leanmill"))
    assert first == "first pass over 'data' is done: rows: 1 read"
    assert warning.startswith("'data' is trained for more than 40 passes")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_conversation_that_the_template_refuses_is_named(tokenizer, tmp_path, streaming):
    strange = [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": c} for c in (*conversations(4), strange)])
    config = hf_config(path, tmp_path, source={"streaming": streaming}, task="sft", sequence_length=128)
    with pytest.raises(
        ConfigError, match=rf"row 5 of {tmp_path}/a\.jsonl: the chat template refuses.*unknown role tool"
    ):
        build_train_data(config, tokenizer, seed=0).next_rows(1)


def test_sft_refuses_to_split():
    with pytest.raises(ValueError, match="would cut a conversation from its answer"):
        DataConfig(task="sft", long_documents="split")


def test_a_row_in_the_middle_of_a_long_run_costs_nothing(folder, tokenizer):
    data = build_train_data(config_of("map", folder), tokenizer, seed=0)
    state = data.state_dict()
    state["rows"] = {"data": 10**9}
    data.load_state_dict(state)
    assert data.next_rows(2)["input_ids"].shape == (2, 32)
    assert data.position_tokens == (10**9 + 2) * 32


@pytest.mark.parametrize("kind", ["map", "map_whole", "sft"])
def test_a_packed_row_computes_what_its_documents_compute_alone(folder, tokenizer, kind):
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    batch = build_train_data(config_of(kind, folder), tokenizer, seed=3).next_rows(4)
    assert (batch["position_ids"] == 0).sum() > 4
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        for row in range(4):
            starts = (batch["position_ids"][row] == 0).nonzero().flatten().tolist()
            for start, end in zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True):
                alone = model(input_ids=batch["input_ids"][row : row + 1, start:end], use_cache=False).logits
                torch.testing.assert_close(packed[row, start:end], alone[0], rtol=1e-4, atol=1e-5)


def test_an_epoch_is_every_row_of_every_source(tokenizer, folder):
    data = build_train_data(config_of("map", folder), tokenizer, seed=0)
    num_tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in sentences(37))
    assert data.rows_per_epoch == num_tokens // 32
    assert data.epochs(3 * data.rows_per_epoch) == 3
    sources = [
        HfDataset(name=n, path=str(folder / f"{n}.jsonl"), weight=w, validation_fraction=0)
        for n, w in (("a", 1), ("b", 3))
    ]
    both = config_of("map", folder).model_copy(update={"source": Mixture(sources=sources)})
    of_b = build_train_data(hf_config(str(folder / "b.jsonl"), folder), tokenizer, seed=0).rows_per_epoch
    assert build_train_data(both, tokenizer, seed=0).rows_per_epoch == data.rows_per_epoch + of_b
    stream = build_train_data(config_of("mixture", folder), tokenizer, seed=0)
    assert stream.rows_per_epoch is None
    assert stream.epochs(5) is None
