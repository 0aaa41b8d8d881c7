"""Which files are read, which are left lying, and what is said of both."""

from pathlib import Path

import pytest

from leanmill.data.config import HfDataset
from leanmill.data.hf import open_hf
from leanmill.data.local_files import by_kind, local_files
from tests.data.samples import write_texts


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "test.jsonl"):
        write_texts(tmp_path / name, 3)
    for name in ("x.csv", "y.csv", "z.pdf", "README.md", "LICENSE", "dataset_info.json", ".hidden.csv"):
        (tmp_path / name).write_text("{}")
    return tmp_path


def opened(path, **settings):
    return open_hf(HfDataset(path=str(path), validation_fraction=0, **settings), "pretrain", Path("unused"))


def test_files_are_counted_by_kind(folder):
    assert opened(folder).note == (
        "files read: 2 .jsonl; files of other splits: 1; "
        "files ignored: 2 .csv, 1 without ending, 1 .md, 1 .json, 1 .pdf"
    )
    assert by_kind(["a.csv", "b.csv", "c", "d.x"]) == "2 .csv, 1 without ending, 1 .x"


def test_only_what_may_have_been_meant_as_data_is_warned_of(folder):
    (warning,) = opened(folder).warnings
    assert warning.startswith(f"2 .csv, 1 .pdf in '{folder}' are no json files and are ignored, e.g. {folder}/x.csv; ")
    for name in ("x.csv", "y.csv", "z.pdf"):
        (folder / name).unlink()
    assert opened(folder).warnings == []


def test_a_single_file_and_a_matching_glob_ignore_nothing(folder):
    assert opened(folder / "a.jsonl").note == "files read: 1 .jsonl"
    assert opened(folder / "[ab].jsonl").note == "files read: 2 .jsonl"


def test_folders_with_equal_names_inside_are_told_apart(tmp_path):
    """The folder of a file decides its split, so two files that swap folders are other data."""
    keys = []
    for name, (first, second) in {"one": (3, 4), "two": (4, 3)}.items():
        for inner, count in (("x", first), ("y", second)):
            (tmp_path / name / inner).mkdir(parents=True)
            write_texts(tmp_path / name / inner / "a.jsonl", count)
        keys.append(opened(tmp_path / name, streaming=True).stream_key)
    assert keys[0] != keys[1]


def test_a_hub_name_has_no_files():
    assert local_files(HfDataset(path="owner/name")) is None
