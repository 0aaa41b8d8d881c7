"""`local_corpus`: real text that every machine with the dependencies has, in three domains.

- `python`: sources of the standard library, then of the installed packages;
- `cpp`: headers under torch/include;
- `english`: package descriptions, READMEs and licences, then docstrings until the domain is full.

The text depends on the machine; its fingerprint goes into checkpoints, so a resume on other text
is refused. Files are taken in the order of a hash of their path inside the installation and their
size (so that only as many files are read as are used, whatever the order of directories), each
exact copy once, and a file is held out by the hash of its content. A docstring is held out with
the file it comes from: text of a validation file reaches training through no domain.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from leanmill.core.errors import ConfigError
from leanmill.data.cache import cached_folder, fingerprint, read_json, write_json
from leanmill.data.config import LocalCorpus
from leanmill.data.local_files import by_kind


Domain = Literal["python", "cpp", "english"]

_VERSION = 3
"""Raise when the same files would give other text."""
_MAX_FILE_BYTES = 128 * 1024
"""Larger files are generated tables more often than prose or code."""
_MIN_VALIDATION_BYTES = 1 << 20
"""Held-out text kept however small the share is, so that an evaluation has something to read."""
_ENOUGH_VALIDATION_BYTES = 384 * 1024
"""With the training text full, no more files are read once this much is held out."""
_MIN_DOCSTRING_CHARS = 200
_CPP_ENDINGS = (".h", ".hpp", ".cuh")
_PROSE_ENDINGS = (".md", ".rst")
_PROSE_STEMS = ("LICENSE", "LICENCE", "README", "NOTICE", "METADATA", "CHANGELOG", "CHANGES", "CONTRIBUTING")
_DOCSTRING = re.compile(r':[ \t]*\n[ \t]*[rR]?"""(.*?)"""', re.DOTALL)


@dataclass(frozen=True)
class CorpusText:
    """The text of one domain, in memory."""

    train: list[str]
    validation: list[str]
    text_fingerprint: str
    num_skipped: int
    """Files left out because they are not UTF-8."""
    kinds: str
    """Files read, by ending: `812 .py`."""


@dataclass(frozen=True)
class _File:
    root: str
    relative: str
    size: int

    @property
    def order(self) -> bytes:
        return hashlib.blake2b(f"{self.relative}\0{self.size}".encode(errors="replace"), digest_size=8).digest()

    def read(self) -> bytes:
        with open(os.path.join(self.root, self.relative), "rb") as file:
            return file.read()


def domain_max_bytes(config: LocalCorpus, domain: Domain) -> int | None:
    """Bytes read of `domain`: `max_bytes` scaled by its weight, so that epochs end together."""
    if config.max_bytes is None:
        return None
    return max(1, int(config.max_bytes * config.domains[domain] / max(config.domains.values())))


def corpus_domain(config: LocalCorpus, domain: Domain, root: Path) -> CorpusText:
    """Return the text of one domain, from the cache where the installation has not changed.

    Raises:
        ConfigError: The machine has no text for the domain.
    """
    settings = {
        **config.model_dump(exclude={"type", "domains"}),
        "version": _VERSION,
        "domain": domain,
        "max_bytes": domain_max_bytes(config, domain),
    }
    key = fingerprint([settings, _listing()])
    folder = cached_folder(root, "corpus", key, lambda path: _build(config, domain, path))
    facts = read_json(folder / "facts.json")
    return CorpusText(
        _load_documents(folder, "train"),
        _load_documents(folder, "validation"),
        facts["text"],
        facts["skipped"],
        facts["kinds"],
    )


def _build(config: LocalCorpus, domain: Domain, folder: Path) -> None:
    max_bytes = domain_max_bytes(config, domain)
    limit = max_bytes if max_bytes is not None else sys.maxsize
    held_out_limit = min(limit, max(int(limit * config.validation_fraction), _MIN_VALIDATION_BYTES))
    documents_seen = set[bytes]()  # of both splits: what one has, the other must not
    splits = {"train": _Split(limit, documents_seen), "validation": _Split(held_out_limit, documents_seen)}
    skipped, files_seen, names = 0, set[bytes](), list[str]()
    for name, content, documents_of in _contents(domain):
        digest = hashlib.blake2b(content, digest_size=16).digest()
        split = splits["validation" if _is_held_out(digest, config.validation_fraction) else "train"]
        if digest in files_seen or split.full:
            continue
        files_seen.add(digest)
        try:
            documents = documents_of(content.decode())
        except UnicodeDecodeError:
            skipped += 1
            continue
        names.append(name)
        for document in documents:
            split.add(document.encode())
        if splits["train"].full and splits["validation"].num_bytes >= min(held_out_limit, _ENOUGH_VALIDATION_BYTES):
            break
    for split_name, split in splits.items():
        if not split.documents:
            raise ConfigError(
                f"local_corpus: this machine has no {split_name} text for the domain {domain!r} within {max_bytes} "
                f"bytes; raise data.source.max_bytes or validation_fraction, or remove the domain from "
                f"data.source.domains"
            )
        _save_documents(folder, split_name, split.documents)
    facts = {"text": _text_fingerprint(splits), "skipped": skipped, "kinds": by_kind(names)}
    write_json(folder / "facts.json", facts)


class _Split:
    """Documents of one split, each once, until the limit in bytes is reached."""

    def __init__(self, limit: int, seen: set[bytes]) -> None:
        self.limit, self.num_bytes, self.full = limit, 0, False
        self.documents: list[bytes] = []
        self._seen = seen

    def add(self, document: bytes) -> None:
        if self.num_bytes + len(document) > self.limit:
            self.full = True  # a smaller document may still fit, but then the largest would never be read
        digest = hashlib.blake2b(document, digest_size=16).digest()
        if self.full or digest in self._seen or not document.strip():
            return
        self._seen.add(digest)
        self.documents.append(document)
        self.num_bytes += len(document)


def _contents(domain: Domain) -> Iterator[tuple[str, bytes, Callable[[str], list[str]]]]:
    """Yield the name and content of each file and what turns it into documents, one at a time."""
    if domain == "python":
        yield from ((file.relative, file.read(), _whole) for file in _python_files())
    elif domain == "cpp":
        yield from ((file.relative, file.read(), _whole) for file in _cpp_files())
    else:
        for file in _prose_files():
            yield file.relative, file.read(), _description if file.relative.endswith("METADATA") else _whole
        yield from ((file.relative, file.read(), _docstrings) for file in _python_files())


def _whole(text: str) -> list[str]:
    return [text]


def _description(metadata: str) -> list[str]:
    """Drop the header, which is key-value lines; the description follows the first empty line."""
    return [metadata.partition("\n\n")[2]]


def _docstrings(source: str) -> list[str]:
    return [_dedent(text) for text in _DOCSTRING.findall(source) if len(text) >= _MIN_DOCSTRING_CHARS]


def _dedent(docstring: str) -> str:
    lines = docstring.strip().splitlines()
    indent = min((len(line) - len(line.lstrip()) for line in lines[1:] if line.strip()), default=0)
    return "\n".join([*lines[:1], *(line[indent:].rstrip() for line in lines[1:])])


def _is_held_out(digest: bytes, fraction: float) -> bool:
    return int.from_bytes(digest[-8:], "big") < fraction * 2.0**64


def _text_fingerprint(splits: dict[str, _Split]) -> str:
    total = hashlib.blake2b(digest_size=8)
    for name in sorted(splits):
        for document in splits[name].documents:
            total.update(hashlib.blake2b(document, digest_size=16).digest())
    return total.hexdigest()


def _save_documents(folder: Path, name: str, documents: list[bytes]) -> None:
    (folder / f"{name}.txt").write_bytes(b"".join(documents))
    np.save(folder / f"{name}_ends.npy", np.cumsum([len(d) for d in documents], dtype=np.int64))


def _load_documents(folder: Path, name: str) -> list[str]:
    content = (folder / f"{name}.txt").read_bytes()
    ends = np.load(folder / f"{name}_ends.npy", allow_pickle=False).tolist()
    return [content[start:end].decode() for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _installation() -> tuple[str, list[str]]:
    paths = sysconfig.get_paths()
    return paths["stdlib"], sorted({paths["purelib"], paths["platlib"]})


def _listing() -> list[str]:
    """Names that change when a package is installed, removed or upgraded; milliseconds to read."""
    _, packages = _installation()
    names = [sys.version, *(name for path in packages if os.path.isdir(path) for name in os.listdir(path))]
    include = _torch_include()
    names += os.listdir(include) if include else []
    # Our own folder moves with every edit of the project and must not rebuild the corpus.
    return sorted(name for name in names if "leanmill" not in name and name != "__pycache__")


def _torch_include() -> str | None:
    spec = importlib.util.find_spec("torch")  # finds the package without importing it
    for location in (spec.submodule_search_locations or []) if spec else []:
        include = os.path.join(location, "include")
        if os.path.isdir(include):
            return include
    return None


def _python_files() -> list[_File]:
    stdlib, packages = _installation()
    # The standard library first: up to its 30 MB, machines with one Python read the same text.
    return [*_sources(stdlib, skip=("site-packages", "dist-packages")), *_sources(*packages)]


def _sources(*roots: str, skip: tuple[str, ...] = ()) -> list[_File]:
    files = (file for root in roots for file in _walk(root, skip))
    return _in_order(file for file in files if file.relative.endswith(".py"))


def _cpp_files() -> list[_File]:
    include = _torch_include()
    return _in_order(f for f in _walk(include) if f.relative.endswith(_CPP_ENDINGS)) if include else []


def _prose_files() -> list[_File]:
    found = (file for path in _installation()[1] for file in _walk(path))
    return _in_order(
        file
        for file in found
        if file.relative.endswith(_PROSE_ENDINGS)
        or os.path.basename(file.relative).upper().partition(".")[0] in _PROSE_STEMS
        and not file.relative.endswith(".py")
    )


def _in_order(files: Iterable[_File]) -> list[_File]:
    return sorted(files, key=lambda file: (file.order, file.relative))


def _walk(root: str, skip: tuple[str, ...] = (), below: str = "") -> Iterator[_File]:
    with os.scandir(os.path.join(root, below)) as entries:
        for entry in entries:
            name = entry.name
            if entry.is_dir(follow_symlinks=False):
                if name != "__pycache__" and name not in skip and "leanmill" not in name:
                    yield from _walk(root, (), f"{below}{name}/")
            elif name.endswith((".py", *_CPP_ENDINGS, *_PROSE_ENDINGS)) or name.upper().startswith(_PROSE_STEMS):
                size = entry.stat(follow_symlinks=False).st_size
                if 0 < size <= _MAX_FILE_BYTES and not entry.is_symlink():
                    yield _File(root, f"{below}{name}", size)
