"""Which files of a folder are a dataset's, and which are left lying."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from leanmill.core.errors import ConfigError
from leanmill.core.paths import expand_user
from leanmill.data.config import HfDataset


_FORMATS: dict[str, tuple[str, ...]] = {
    "json": (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst"),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
    "text": (".txt", ".md", ".text"),
}
_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".npy", ".npz", ".joblib")
_LOCAL = ("/", "./", "../", "~")
_ENDINGS = tuple(chain.from_iterable(_FORMATS.values()))
_OTHER_SPLITS = {"validation", "valid", "val", "dev", "test", "eval"}
_METADATA = ("dataset_info.json", "dataset_infos.json", "state.json")
_BESIDE_DATA = re.compile(r"(readme|licen[cs]e|notice|changelog|citation|makefile)\b.*", re.IGNORECASE)


@dataclass(frozen=True)
class LocalFiles:
    """The files of a local dataset."""

    format: str
    files: list[str]
    """Paths, sorted."""
    ignored: list[str]
    """Files beside them that are of another kind."""
    root: str
    """Folder that names in keys and messages are relative to."""

    def sizes(self) -> list[tuple[str, int]]:
        """(name, bytes) of each file: what survives a copy to another machine."""
        return [(os.path.relpath(f, self.root), os.path.getsize(f)) for f in self.files]

    def of_split(self, split: str, config: HfDataset) -> list[str]:
        """Files whose path names the split; files that name no split at all are `train`.

        Raises:
            ConfigError: There is none.
        """
        words = {f: set(re.split(r"[^a-z0-9]+", os.path.relpath(f, self.root).lower())) for f in self.files}
        chosen = [f for f in self.files if split.lower() in words[f]]
        if not chosen and split == "train":
            chosen = [f for f in self.files if not words[f] & _OTHER_SPLITS]
            chosen = chosen or (self.files if len(self.files) == 1 else [])
        if not chosen:
            raise ConfigError(
                f"data.source.split: no file of {config.path!r} is named after the split {split!r}; name one e.g. "
                f"{split}.jsonl, or leave validation_split out to hold out a share of the rows"
            )
        return chosen

    @property
    def surprising(self) -> list[str]:
        """Ignored files that may have been meant as data: no README, licence or dataset_info.json."""
        names = {f: os.path.basename(f) for f in self.ignored}
        return [f for f, name in names.items() if name not in _METADATA and not _BESIDE_DATA.fullmatch(name)]


def by_kind(files: Iterable[str]) -> str:
    """Count files by ending, most frequent first: `3 .csv, 1 .pdf`."""
    counts = Counter(os.path.splitext(f)[1] or "without ending" for f in files)
    return ", ".join(f"{number:,} {ending}" for ending, number in counts.most_common())


def local_files(config: HfDataset) -> LocalFiles | None:
    """Return the files of a local source; None where `path` is a hub name.

    Raises:
        ConfigError: No such file, none of a format that is read, or several formats.
    """
    path = str(expand_user(config.path))
    if os.path.isdir(path):
        found = sorted(str(p) for p in Path(path).rglob("*") if p.is_file() and not _is_hidden(p, path))
    elif os.path.isfile(path):
        found = [path]
    elif glob.has_magic(path):
        found = sorted(f for f in glob.glob(path, recursive=True) if os.path.isfile(f))
    elif config.path.startswith(_LOCAL) or path.endswith((*_ENDINGS, *_PICKLES)) or path.count("/") > 1:
        raise ConfigError(f"data.source.path: no file or folder {config.path!r}; give a file, folder, glob or hub name")
    else:
        return None
    kind, files = _one_format(config, found, is_file=os.path.isfile(path))
    root = os.path.commonpath([os.path.dirname(f) for f in files])
    return LocalFiles(kind, files, sorted(set(found) - set(files)), root)


def _one_format(config: HfDataset, found: list[str], *, is_file: bool) -> tuple[str, list[str]]:
    if is_file and config.format != "auto":
        return config.format, found
    wanted = _FORMATS if config.format == "auto" else {config.format: _FORMATS[config.format]}
    by_format = {kind: [f for f in found if f.endswith(endings)] for kind, endings in wanted.items()}
    # READMEs and licences lie beside data and are not it.
    data = {kind: files for kind, files in by_format.items() if files and kind != "text"}
    data = data or {kind: files for kind, files in by_format.items() if files}
    if "json" in data:
        only_data = [f for f in data["json"] if os.path.basename(f) not in _METADATA]
        data = {kind: files for kind, files in {**data, "json": only_data}.items() if files}
    if len(data) > 1:
        raise ConfigError(
            f"data.source.path: {config.path!r} holds files of several formats ({', '.join(data)}); set "
            f"data.source.format to one"
        )
    if not data:
        endings = sorted({os.path.splitext(f)[1] or "no ending" for f in found})
        pickled = any(f.endswith(_PICKLES) for f in found)
        only = f" (only {', '.join(endings[:5])})" if endings else ""
        refused = "; pickles are never loaded" if pickled else ""
        raise ConfigError(
            f"data.source.path: {config.path!r} holds no {'/'.join(wanted)} file{only}{refused}; convert it to .jsonl, "
            f".parquet, .arrow or .txt"
        )
    return next(iter(data.items()))


def _is_hidden(path: Path, root: str) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)
