"""Reading what `leanmill data prepare` wrote: tokens in shards that every rank and run shares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanmill.core.errors import ConfigError
from leanmill.core.paths import expand_user
from leanmill.data.cache import fingerprint, read_json
from leanmill.data.config import DataConfig, Prepared
from leanmill.data.documents import DocumentReader
from leanmill.data.encoding import Document, Encoded, Measured
from leanmill.data.offsets import OFFSETS, read_offsets
from leanmill.data.selection import choose, is_choice, read_scores
from leanmill.data.store import TokenStore
from leanmill.data.tally import Tally


MANIFEST, TOKENIZER, HELD_OUT = "manifest.json", "tokenizer", "held_out"
VERSION = 1
"""Raise when folders of before would be read wrongly."""


class Shards:
    """Arrays one behind the other, memory-mapped, as one [N]."""

    def __init__(self, arrays: Sequence[NDArray[Any]]) -> None:
        self._arrays = list(arrays)
        self._ends = np.cumsum([len(array) for array in arrays], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: Any) -> NDArray[Any]:
        index = np.asarray(index)
        which = np.searchsorted(self._ends, index, side="right")
        found = np.empty(index.shape, dtype=self._arrays[0].dtype)
        for shard in np.unique(which).tolist():
            here, first = which == shard, self._ends[shard] - len(self._arrays[shard])
            found[here] = self._arrays[shard][index[here] - first]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        whole = np.concatenate(self._arrays)
        return whole if dtype is None else whole.astype(dtype)


class PreparedDomain:
    """One domain of a prepared folder; it has no documents, only their tokens."""

    streaming = False
    column = "row"
    held_out_content: str | None = None

    def __init__(self, folder: Path, facts: dict[str, Any], weight: float, kind: dict[str, Any]) -> None:
        self.name, self.weight = str(facts["name"]), weight
        self._folder, self._facts, self._kind = folder / facts["folder"], facts, kind
        self.key = fingerprint([facts["text"], facts.get("held_out"), kind, facts["shards"]])
        self.note = f"prepared in {folder}"
        self.warnings: list[str] = []
        self.scores: Path | None = None
        self.kept_share = 0.5

    @property
    def text(self) -> str:
        """Fingerprint of the training text, whatever the tokenizer."""
        return str(self._facts["text"])

    @property
    def tokenizer_key(self) -> str:
        """Fingerprint of the tokenizer that its tokens are of."""
        return str(self._kind["tokenizer"])

    @property
    def num_shards(self) -> int:
        """Shards of training tokens."""
        return len(self._facts["shards"])

    def shard_documents(self, shard: int) -> list[NDArray[Any]]:
        """Return the tokens of each document of a shard, memory-mapped.

        Raises:
            ConfigError: The shard is missing or cut.
        """
        ends = np.cumsum(np.load(self._array_file("lengths", shard), allow_pickle=False))[:-1]
        return np.split(self._mapped("tokens", shard, np.dtype(self._kind["dtype"])), ends)

    def shard_targets(self, shard: int) -> list[NDArray[np.bool_]] | None:
        """Return which tokens of each document of a shard are learned; None of text, where all are.

        Raises:
            ConfigError: The shard is missing or cut.
        """
        if self._kind["task"] not in ("sft", "preference"):
            return None
        ends = np.cumsum(np.load(self._array_file("lengths", shard), allow_pickle=False))[:-1]
        return np.split(self._mapped("targets", shard, np.dtype(np.bool_)), ends)

    def train(self) -> DocumentReader:
        """Return what names rows; the documents themselves are gone."""
        return _Rows(self.name, str(self._folder))

    def validation(self) -> None:
        """Nothing; see `held_out`."""

    def store(self, tokenizer_key: str) -> TokenStore:
        """Return the training tokens, of the best documents only where there are scores.

        Raises:
            ConfigError: They are another tokenizer's, a shard is missing or cut, or the scores do not fit.
        """
        self._check(tokenizer_key)
        whole = self._whole_store()
        if self.scores is None:
            return whole
        scores = read_scores(self.scores, domain=self.name, text=self.text, num_documents=whole.num_documents)
        chosen, num_kept = choose(whole, scores, None if is_choice(self.scores) else self.kept_share)
        self.note = f"{self.note}, {num_kept:,} of {len(scores):,} documents chosen by {self.scores}"
        return chosen

    def _whole_store(self) -> TokenStore:
        has_targets = self._kind["task"] in ("sft", "preference")
        return TokenStore(
            Shards([self._mapped("tokens", shard, np.dtype(self._kind["dtype"])) for shard in self._shards]),
            Shards([self._mapped("targets", shard, np.dtype(np.bool_)) for shard in self._shards])
            if has_targets
            else None,
            self._offsets(),
            self._rows(),
            self._facts["text"],
            Tally.from_state(self._facts["tally"]),
            int(self._kind["num_pieces"]),
        )

    def _offsets(self) -> NDArray[np.int64]:
        paths = [self._array_file("lengths", shard) for shard in self._shards]
        offsets = read_offsets(self._folder, paths)
        if int(offsets[-1]) != sum(self._facts["shards"]):
            raise _damaged(self._folder / OFFSETS)
        return offsets

    def _rows(self) -> Shards | None:
        """Numbers of the rows that documents are of, of pairs at any rate."""
        is_paired = self._kind["num_pieces"] > 1
        if not is_paired and not (self._folder / shard_file("rows", 0, "npy")).is_file():
            return None
        return Shards([np.load(self._array_file("rows", n), mmap_mode="r", allow_pickle=False) for n in self._shards])

    def held_out(self, tokenizer_key: str) -> Iterator[Measured] | None:
        """Return the held-out documents as tokens; None where none were to be held out."""
        self._check(tokenizer_key)
        folder = self._folder / HELD_OUT
        return _held_out(folder) if folder.is_dir() else None

    def _check(self, tokenizer_key: str) -> None:
        if tokenizer_key != self._kind["tokenizer"]:
            raise ConfigError(
                f"data.source.path: {self._folder.parent} was prepared with another tokenizer than the run has; remove "
                f"data.tokenizer to take the folder's own, or prepare the data anew"
            )

    @property
    def _shards(self) -> range:
        return range(self.num_shards)

    def _mapped(self, name: str, shard: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        path, num_tokens = self._folder / shard_file(name, shard, "bin"), self._facts["shards"][shard]
        if not path.is_file() or path.stat().st_size != num_tokens * dtype.itemsize:
            raise _damaged(path)
        return np.memmap(path, dtype=dtype, mode="r")

    def _array_file(self, name: str, shard: int) -> Path:
        path = self._folder / shard_file(name, shard, "npy")
        if not path.is_file():
            raise _damaged(path)
        return path


class _Rows:
    """Names of rows that are not there any more."""

    def __init__(self, name: str, folder: str) -> None:
        self.tally = Tally()
        self._name, self._folder = name, folder

    def locate(self, number: int) -> str:
        """See `DocumentReader`."""
        return f"row {number:,} of {self._name!r} (as {self._folder} was prepared from it)"

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        raise StopIteration


def open_prepared(config: Prepared, data: DataConfig) -> list[PreparedDomain]:
    """Open a prepared folder without reading its tokens.

    Raises:
        ConfigError: It is none, or was not finished, or was prepared for another task.
    """
    folder = expand_user(config.path)
    if not (folder / MANIFEST).is_file():
        raise ConfigError(
            f"data.source.path: {config.path!r} holds no finished prepared data; run `leanmill data prepare RECIPE "
            f"--out {config.path}` (it goes on where it was ended)"
        )
    manifest = read_json(folder / MANIFEST)
    kind = manifest["kind"]
    if manifest["version"] != VERSION:
        raise ConfigError(f"data.source.path: {config.path!r} was prepared by another version; prepare the data anew")
    if config.scores is not None and data.task not in ("pretrain", "sft"):
        raise ConfigError(
            f"data.source.scores: scores are of text and conversations, and the recipe has data.task={data.task}; "
            f"remove it"
        )
    wanted = {"task": data.task, "num_pieces": data.num_pieces}
    if any(kind[key] != value for key, value in wanted.items()):
        given = f"data.task={data.task}" + (" with mismatched answers" if data.mismatched_answers else "")
        raise ConfigError(
            f"data.source.path: {config.path!r} was prepared for task {kind['task']} ({kind['num_pieces']} to a "
            f"document), and the recipe has {given}; change data.task, or prepare the data anew"
        )
    found = [PreparedDomain(folder, facts, config.weight * facts["weight"], kind) for facts in manifest["domains"]]
    for domain in found:
        domain.scores = None if config.scores is None else expand_user(config.scores)
        domain.kept_share = 0.5 if config.kept_share is None else config.kept_share
    return found


def shard_file(name: str, shard: int, ending: str) -> str:
    """Return the name of a file of a shard."""
    return f"{name}-{shard:05d}.{ending}"


def _held_out(folder: Path) -> Iterator[Measured]:
    lengths = np.load(folder / "lengths.npy", allow_pickle=False)
    ids, num_bytes = (np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("tokens", "num_bytes"))
    text = np.load(folder / "text.npy", allow_pickle=False)
    path = folder / "targets.npy"
    targets = np.load(path, allow_pickle=False) if path.is_file() else None
    token, byte = 0, 0
    for length in lengths.tolist():
        part = slice(token, token + length)
        size = int(num_bytes[part].sum())
        is_target = None if targets is None else targets[part]
        yield Measured(
            Encoded(ids[part].astype(np.int64), is_target), num_bytes[part].astype(np.int64), text[byte : byte + size]
        )
        token, byte = token + length, byte + size


def _damaged(path: Path) -> ConfigError:
    return ConfigError(f"data.source.path: {path} is missing or cut; copy it anew, or prepare the data anew")
