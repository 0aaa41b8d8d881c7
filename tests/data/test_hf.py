"""Local files of every format, splits, and what cannot be read."""

from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from leanmill.core.errors import ConfigError, RunError
from leanmill.data import row_sources, text_files
from leanmill.data.config import HfDataset
from leanmill.data.encoding import document_digest
from leanmill.data.hf import open_hf
from tests.data.samples import conversations, sentences, write_jsonl, write_texts


def opened(path, *, task="pretrain", **settings):
    cache = Path(str(path)).parent / "cache"
    return open_hf(HfDataset(path=str(path), **{"validation_fraction": 0.0, **settings}), task, cache)


def texts(path, **settings):
    return list(opened(path, **settings).train())


def write(kind, folder, rows):
    table = pa.table({"text": rows})
    if kind == "jsonl":
        write_jsonl(folder / "a.jsonl", [{"text": row} for row in rows])
    elif kind == "parquet":
        pq.write_table(table, folder / "a.parquet")
    elif kind == "arrow":
        with pa.OSFile(str(folder / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    else:
        datasets.Dataset(table).save_to_disk(str(folder / "saved"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow", "saved"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_format_gives_the_same_documents(tmp_path, kind, streaming):
    write(kind, tmp_path, sentences(23))
    assert texts(tmp_path, streaming=streaming) == sentences(23)


def test_a_file_a_glob_and_a_folder_are_the_same(tmp_path):
    for n in range(3):
        write_jsonl(tmp_path / f"part-{n}.jsonl", [{"text": t} for t in sentences(4, start=4 * n)])
    (tmp_path / "README.md").write_text("not data")
    assert texts(tmp_path) == texts(tmp_path / "*.jsonl") == sentences(12)
    assert texts(tmp_path / "part-1.jsonl") == sentences(4, start=4)


def write_files(folder, count, **others):
    folder.mkdir()
    for n in range(count):
        (folder / f"{n}.txt").write_text(f"file {n}\nof some naïve words\n" * (n + 1), encoding="utf-8")
    for name, text in others.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def test_a_text_file_is_one_document(tmp_path):
    content = "".join(f"line {n} of a long naïve text\n" for n in range(3000))
    folder = write_files(tmp_path / "texts", 2, book=content, empty="")
    assert texts(folder) == [*(f"file {n}\nof some naïve words\n" * (n + 1) for n in range(2)), content]


@pytest.mark.parametrize("fraction", [0.001, 0.3, 0.999])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_text_file_lies_on_one_side_and_neither_is_empty(tmp_path, fraction, streaming):
    folder = write_files(tmp_path / "texts", 4)
    documents = opened(folder, validation_fraction=fraction, streaming=streaming)
    train, held_out = list(documents.train()), list(documents.validation())
    assert sorted(train + held_out) == sorted(texts(folder))
    assert train
    assert held_out
    assert not set(train) & set(held_out)
    # Another process finds the same sides, from the cache or not.
    assert list(opened(folder, validation_fraction=fraction, streaming=streaming).validation()) == held_out


def test_parts_of_a_long_file_and_copies_of_it_stay_together(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_DOCUMENT_CHARS", 50)
    monkeypatch.setattr(row_sources, "MAX_DOCUMENT_CHARS", 50)
    content = "".join(f"line {n} of a naïve text\n" for n in range(20))
    folder = write_files(tmp_path / "texts", 6, book=content, copy=content)
    documents = opened(folder, validation_fraction=0.4)
    assert "files cut at line ends every 50 characters: " in documents.note
    for side in (list(documents.train()), list(documents.validation())):
        parts = [text for text in side if "naïve text" in text]
        assert len(parts) in (0, 14)
        assert "".join(parts) in ("", content * 2)
        assert all(part.endswith("\n") and len(part) < 80 for part in parts)


@pytest.mark.parametrize("limit", [50, 1 << 20])
@pytest.mark.parametrize("fraction", [1e-9, 0.25, 0.9, 1 - 1e-9])
def test_of_a_single_file_the_end_is_held_out(tmp_path, monkeypatch, fraction, limit):
    monkeypatch.setattr(text_files, "MAX_DOCUMENT_CHARS", limit)
    content = "".join(f"line {n} of a naïve text\n" for n in range(20))
    (tmp_path / "book.txt").write_text(content, encoding="utf-8")
    documents = opened(tmp_path / "book.txt", validation_fraction=fraction)
    train, held_out = "".join(documents.train()), "".join(documents.validation())
    assert train + held_out == content
    assert train.endswith("\n")
    assert train
    assert abs(len(held_out) - fraction * len(content)) < 30
    assert held_out
    assert f"of this one file, the last {fraction:.3g} are held out" in documents.note
    assert texts(tmp_path / "book.txt") == ["".join(texts(tmp_path / "book.txt"))] or limit == 50


@pytest.mark.parametrize("content", ["one line without an end", "a\nb", "ab"])
def test_a_single_file_of_hardly_anything_has_both_sides(tmp_path, content):
    (tmp_path / "book.txt").write_text(content)
    documents = opened(tmp_path / "book.txt", validation_fraction=0.01)
    train, held_out = list(documents.train()), list(documents.validation())
    assert (len(train), len(held_out)) == (1, 1)
    assert train[0] + held_out[0] == content


@pytest.mark.parametrize("fraction", [0.0001, 0.9999])
def test_few_rows_have_both_sides(tmp_path, fraction):
    path = write_texts(tmp_path / "a.jsonl", 9)
    documents = opened(path, validation_fraction=fraction)
    train, held_out = list(documents.train()), list(documents.validation())
    assert min(len(train), len(held_out)) == 1
    assert sorted(train + held_out) == sorted(sentences(9))


def test_rows_enough_are_shared_out_by_hash_alone(tmp_path):
    path = write_texts(tmp_path / "a.jsonl", 60)
    wanted = [t for t in sentences(60) if int.from_bytes(document_digest(t)[-8:], "big") < 0.2 * 2.0**64]
    assert list(opened(path, validation_fraction=0.2).validation()) == wanted


def test_held_out_rows_are_the_rest(tmp_path):
    path = write_texts(tmp_path / "a.jsonl", 200)
    documents = opened(path, validation_fraction=0.2)
    train, held_out = list(documents.train()), list(documents.validation())
    assert 15 < len(held_out) < 70
    assert sorted(train + held_out) == sorted(sentences(200))
    assert opened(path).validation() is None


def test_splits_by_file_name(tmp_path):
    write_jsonl(tmp_path / "train-0.jsonl", [{"text": "a"}])
    write_jsonl(tmp_path / "validation.jsonl", [{"text": "b"}])
    documents = opened(tmp_path, validation_split="validation")
    assert list(documents.train()) == ["a"]
    assert list(documents.validation()) == ["b"]
    with pytest.raises(ConfigError, match="split 'dev'"):
        list(opened(tmp_path, validation_split="dev").validation())


def test_empty_rows_are_passed_over(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in ("a", "", None, " ", "b")])
    assert texts(path) == ["a", "b"]


@pytest.mark.parametrize("blank", [[], [{"role": "user", "content": " "}, {"role": "assistant", "content": ""}]])
def test_conversations_without_a_word_are_passed_over(tmp_path, blank):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": m} for m in (conversations(1)[0], blank)])
    stream = opened(path, task="sft").train()
    assert len(list(stream)) == 1
    assert stream.tally.describe() == "rows: 2 read, 1 without messages"


def test_conversations(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": c} for c in conversations(5)])
    assert list(opened(path, task="sft").train()) == conversations(5)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_column_names_the_columns(tmp_path, streaming):
    path = write_jsonl(tmp_path / "a.jsonl", [{"content": "a", "id": 1}])
    with pytest.raises(ConfigError, match=r"no column 'text'; it has content, id; set text_field"):
        texts(path, streaming=streaming)
    with pytest.raises(ConfigError, match=r"no column 'messages'; it has content, id; set messages_field"):
        list(opened(path, task="sft").train())
    assert texts(path, text_field="content") == ["a"]


def test_a_row_is_named_within_its_file(tmp_path):
    for name, count in (("a", 3), ("b", 4), ("c", 2)):
        write_texts(tmp_path / f"{name}.jsonl", count)
    (tmp_path / "aa.jsonl").write_text("")
    documents = opened(tmp_path)
    names = [documents.source.locate(number, "train") for number in (3, 4, 7, 9)]
    assert names == [f"row {n} of {tmp_path}/{name}.jsonl" for n, name in ((3, "a"), (1, "b"), (4, "b"), (2, "c"))]


def test_a_far_row_is_not_looked_for(tmp_path, monkeypatch):
    for name in "ab":
        write_texts(tmp_path / f"{name}.jsonl", 3)
    monkeypatch.setattr(row_sources, "_MOST_ROWS_READ_AGAIN", 3)
    documents = opened(tmp_path)
    assert documents.source.locate(3, "train") == f"row 3 of {tmp_path}/a.jsonl"
    assert documents.source.locate(4, "train") == f"row 4 of {tmp_path}, counted over its 2 files"


def test_what_is_no_conversation_is_named_by_file_and_row(tmp_path):
    good = [{"messages": c} for c in conversations(3)]
    write_jsonl(tmp_path / "a.jsonl", good)
    write_jsonl(tmp_path / "b.jsonl", [good[0], {"messages": [{"role": None, "content": "a"}]}])
    with pytest.raises(ConfigError, match=rf"column 'messages' in row 2 of {tmp_path}/b\.jsonl must be a list of"):
        list(opened(tmp_path, task="sft").train())


def test_rows_are_counted_through_a_resume(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in ("a", "", "b", None, "c", "d")])
    documents = opened(path, streaming=True)
    stream = documents.stream(None)
    assert [next(stream), next(stream)] == ["a", "b"]
    resumed = documents.stream(stream.state())
    assert list(resumed) == ["c", "d"]
    assert resumed.tally.describe() == "rows: 6 read, 2 without text"


def test_a_column_that_is_not_text(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": 3}])
    with pytest.raises(ConfigError, match="holds int, not text"):
        texts(path)


def _file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("name", "content"), [("a.jsonl", b'{"text": "\xff\xfe"}\n'), ("a.txt", b"ok\n\xff\xfe\n")])
def test_not_utf8_names_the_file(tmp_path, name, content, streaming):
    path = _file(tmp_path, name, content)
    with pytest.raises(ConfigError, match=rf"{name}' is not UTF-8; convert it") as caught:
        texts(path, streaming=streaming)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", b'{"text": "a"}\n{"text":\n'), ("a.parquet", b"nothing"), ("a.arrow", b"nothing")]
)
def test_damaged_files_are_one_line(tmp_path, name, content):
    with pytest.raises(ConfigError, match="cannot read") as caught:
        texts(_file(tmp_path, name, content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["missing.jsonl", "./missing", "~/nowhere", "/no/such/folder", "no/such/*.jsonl"])
def test_a_missing_file_is_refused(path):
    with pytest.raises(ConfigError, match=r"no file or folder|holds no json/parquet/arrow/text file"):
        opened(path)


@pytest.mark.parametrize("name", ["weights.pt", "data.pkl", "model.bin"])
def test_pickles_are_never_loaded(tmp_path, name):
    _file(tmp_path, name, b"cos\nsystem\n(S'false'\ntR.")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ConfigError, match="pickles are never loaded"):
            opened(path)


def test_a_folder_with_a_loading_script_is_not_run(tmp_path):
    _file(tmp_path, "load.py", b"raise SystemExit('was run')")
    with pytest.raises(ConfigError, match=r"holds no .* file \(only \.py\)"):
        opened(tmp_path)


def test_several_formats_need_a_choice(tmp_path):
    write("jsonl", tmp_path, ["a"])
    write("parquet", tmp_path, ["b"])
    with pytest.raises(ConfigError, match=r"several formats \(json, parquet\)"):
        opened(tmp_path)
    assert texts(tmp_path, format="parquet") == ["b"]


def test_a_hub_that_does_not_answer():
    with pytest.raises(RunError, match=r"'nobody/nothing' is not on this machine.*local JSONL") as caught:
        opened("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (datasets.exceptions.DatasetNotFoundError("doesn't exist"), ConfigError, "no public 'a/b'"),
        (RuntimeError("Dataset scripts are no longer supported, but found b.py"), ConfigError, "never run"),
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), RunError, "does not answer"),
        (ValueError("BuilderConfig 'x' not found. Available: ['y']\nmore"), ConfigError, "'x' not found"),
    ],
)
def test_other_answers_of_the_hub(monkeypatch, error, kind, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    with pytest.raises(kind, match=message) as caught:
        opened("a/b")
    assert "\n" not in str(caught.value)


def test_a_stream_continues_where_its_state_was_taken(tmp_path):
    path = write_texts(tmp_path / "a.jsonl", 30)
    documents = opened(path, streaming=True)
    stream = documents.stream(None)
    first = [next(stream) for _ in range(11)]
    state = stream.state()
    assert first + list(documents.stream(state)) == sentences(30)
    # A state taken right after loading one is that one.
    again = documents.stream(state).state()
    assert first + list(documents.stream(again)) == sentences(30)
    # What load_state_dict sets on a datasets object stays; ours must not be shared.
    assert list(documents.stream(None)) == sentences(30)


def test_the_key_follows_the_content(tmp_path):
    first = opened(write_texts(tmp_path / "a.jsonl", 5)).key
    assert opened(tmp_path / "a.jsonl").key == first
    assert opened(write_texts(tmp_path / "a.jsonl", 6)).key != first
