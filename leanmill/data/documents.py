"""Where documents come from, before tokens: the built-in corpus and Hugging Face datasets alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from leanmill.core.errors import ConfigError
from leanmill.data.config import DataConfig, HfDataset, LocalCorpus, sources_of
from leanmill.data.corpus import CorpusText, Domain, corpus_domain
from leanmill.data.encoding import Document
from leanmill.data.tally import Tally


class DocumentReader(Protocol):
    """Documents of one split in a fixed order."""

    tally: Tally
    """What was read so far; kept up to date by the reader."""

    def locate(self, number: int) -> str:
        """Name row `number` (from 1) for a person, e.g. `row 3 of chats.jsonl`."""
        ...

    def __iter__(self) -> Iterator[Document]: ...

    def __next__(self) -> Document: ...


class DocumentStream(DocumentReader, Protocol):
    """Training documents read one after another, from any place of an epoch."""

    def state(self) -> dict[str, Any]:
        """JSON-able place of the next document."""
        ...


class Documents(Protocol):
    """One domain of text."""

    name: str
    weight: float
    """Sampling weight, relative to the other domains."""
    key: str
    """Cheap fingerprint: changes whenever the documents may have changed."""
    streaming: bool
    column: str
    """What of a row is read, for messages: `column 'text'`."""
    note: str
    """Which files were found and ignored, for the log; empty where there is nothing to say."""
    warnings: list[str]
    """What a person may have expected to be read and is not."""
    held_out_content: str | None
    """Fingerprint of the files that hold the held-out text alone, wherever they lie; None where there are none."""

    def train(self) -> DocumentReader:
        """Open the training documents."""
        ...

    def validation(self) -> DocumentReader | None:
        """Open the held-out documents; None where none are to be held out."""
        ...


class StreamingDocuments(Documents, Protocol):
    """A domain that is read as a stream."""

    shuffle_buffer: int
    stream_key: str
    """Fingerprint of the text that does not need it read as a whole."""

    def stream(self, state: dict[str, Any] | None) -> DocumentStream:
        """Open the stream at its beginning, or where `state` says."""
        ...


class CorpusDocuments:
    """A domain of the built-in corpus."""

    streaming = False
    column = "file"
    held_out_content: str | None = None

    def __init__(self, config: LocalCorpus, domain: Domain, root: Path) -> None:
        self.name: str = domain
        self.weight = config.domains[domain]
        self._text: CorpusText = corpus_domain(config, domain, root)
        self.key = self._text.text_fingerprint
        skipped = f"; files ignored: {self._text.num_skipped:,} not UTF-8" if self._text.num_skipped else ""
        self.note = f"files read: {self._text.kinds}{skipped}"
        self.warnings: list[str] = []

    def train(self) -> DocumentReader:
        """See `Documents`."""
        return _ListReader(self.name, self._text.train)

    def validation(self) -> DocumentReader:
        """See `Documents`."""
        return _ListReader(self.name, self._text.validation)


class _ListReader:
    """Documents in memory."""

    def __init__(self, name: str, documents: list[str]) -> None:
        self.tally = Tally()
        self._name, self._documents = name, iter(documents)

    def locate(self, number: int) -> str:
        """See `DocumentReader`."""
        return f"document {number:,} of {self._name!r}"

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        document = next(self._documents)
        self.tally.num_rows += 1
        return document


def open_documents(config: DataConfig, root: Path) -> list[Documents]:
    """Open every domain of `config.source`, in the order of the recipe.

    Raises:
        ConfigError: A source does not exist, cannot be read or does not fit the task.
    """
    from leanmill.data.hf import open_hf

    domains: list[Documents] = []
    for source in sources_of(config):
        if isinstance(source, HfDataset):
            domains.append(open_hf(source, config.task, root))
        elif isinstance(source, LocalCorpus):
            if not config.is_plain_text:
                raise ConfigError(
                    f"data.task: {config.task} needs conversations, and local_corpus has none; give data.source: "
                    f"{{type: hf, path: FILE.jsonl}}"
                )
            domains += [CorpusDocuments(source, d, root) for d, weight in source.domains.items() if weight > 0]
    check_names(domains)
    return domains


def check_names(domains: Sequence[Documents]) -> None:
    """Refuse two domains of one name.

    Raises:
        ConfigError: See above.
    """
    names = [domain.name for domain in domains]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(f"data.source: two sources are named {repeated[0]!r}; give each its own `name`")
