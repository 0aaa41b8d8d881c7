"""Where documents come from, before tokens: the built-in corpus and Hugging Face datasets alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from leanmill.core.errors import ConfigError
from leanmill.data.config import DataConfig, HfDataset, LocalCorpus
from leanmill.data.corpus import CorpusText, Domain, corpus_domain
from leanmill.data.encoding import Document


class Documents(Protocol):
    """One domain of text."""

    name: str
    weight: float
    """Sampling weight, relative to the other domains."""
    key: str
    """Cheap fingerprint: changes whenever the documents may have changed."""
    streaming: bool
    note: str
    """What a person should know about how it was read; empty where there is nothing."""

    def train(self) -> Iterator[Document]:
        """Open the training documents, in a fixed order."""
        ...

    def validation(self) -> Iterator[Document] | None:
        """Open the held-out documents in a fixed order; None where none are to be held out."""
        ...


class DocumentStream(Protocol):
    """Training documents read one after another, from any place of an epoch."""

    def state(self) -> dict[str, Any]:
        """JSON-able place of the next document."""
        ...

    def __next__(self) -> Document: ...


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

    def __init__(self, config: LocalCorpus, domain: Domain, root: Path) -> None:
        self.name: str = domain
        self.weight = config.domains[domain]
        self._text: CorpusText = corpus_domain(config, domain, root)
        self.key = self._text.text_fingerprint
        skipped = self._text.num_skipped
        self.note = f"{skipped} files skipped for not being UTF-8" if skipped else ""

    def train(self) -> Iterator[Document]:
        """See `Documents`."""
        return iter(self._text.train)

    def validation(self) -> Iterator[Document]:
        """See `Documents`."""
        return iter(self._text.validation)


def open_documents(config: DataConfig, root: Path) -> list[Documents]:
    """Open every domain of `config.source`, in the order of the recipe.

    Raises:
        ConfigError: A source does not exist, cannot be read or does not fit the task.
    """
    from leanmill.data.hf import open_hf

    sources = config.source.sources if config.source.type == "mixture" else [config.source]
    domains: list[Documents] = []
    for source in sources:
        if isinstance(source, HfDataset):
            domains.append(open_hf(source, config.task))
        else:
            if config.task == "sft":
                raise ConfigError(
                    "data.task: sft needs conversations, and local_corpus has none; give data.source: "
                    "{type: hf, path: FILE.jsonl} with a `messages` column"
                )
            domains += [CorpusDocuments(source, d, root) for d, weight in source.domains.items() if weight > 0]
    names = [domain.name for domain in domains]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(f"data.source: two sources are named {repeated[0]!r}; give each its own `name`")
    return domains
