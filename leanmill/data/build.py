"""From the `data` section of a recipe to a tokenizer, training rows and held-out rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from leanmill.core.paths import expand_user
from leanmill.data.cache import cache_root, fingerprint
from leanmill.data.config import ENCODER_TASKS, DataConfig, Prepared, sources_of
from leanmill.data.documents import Documents, StreamingDocuments, check_names, open_documents
from leanmill.data.encoding import Document, Encoder, num_chars
from leanmill.data.evaluation import EvalDomain, eval_domain
from leanmill.data.identity import data_identity
from leanmill.data.masking import masking_of
from leanmill.data.pairs import Pair
from leanmill.data.prepared import TOKENIZER, PreparedDomain, open_prepared
from leanmill.data.sentence_rows import SentenceRows, sentence_domain
from leanmill.data.sentences import SentencePair
from leanmill.data.sources import MapSource, Source, keeps_documents_whole
from leanmill.data.store import token_store
from leanmill.data.stream_source import StreamSource
from leanmill.data.subset import RowSubset
from leanmill.data.tokenizer import load_tokenizer, tokenizer_fingerprint, trained_tokenizer, with_chat_template
from leanmill.data.train_data import TrainData


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def build_tokenizer(config: DataConfig, *, seed: int = 0) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a recipe: loaded, or trained once on the data's own text and cached.

    Args:
        config: The `data` section.
        seed: Unused by byte-level BPE, whose training has no randomness; there so that every
            builder takes one.

    Raises:
        ConfigError: The tokenizer or the data does not exist or does not fit.
        RunError: The hub does not answer.
    """
    tokenizer = _own_tokenizer(config)
    return with_chat_template(tokenizer, config.tokenizer.chat_template)


def _own_tokenizer(config: DataConfig) -> PreTrainedTokenizerFast:
    prepared = [source.path for source in sources_of(config) if isinstance(source, Prepared)]
    for_encoder = config.task in ENCODER_TASKS
    if config.tokenizer.path is None and prepared:
        return load_tokenizer(str(expand_user(prepared[0]) / TOKENIZER), for_encoder=for_encoder)
    if config.tokenizer.path is not None:
        return load_tokenizer(
            config.tokenizer.path,
            trust_remote_code=config.tokenizer.trust_remote_code,
            for_encoder=for_encoder,
        )
    root = cache_root(config.cache_dir)
    domains = open_documents(config, root)
    key = fingerprint([[domain.key, domain.weight] for domain in domains])
    return trained_tokenizer(
        config.tokenizer,
        text_key=key,
        texts=lambda: _training_text(domains, config.tokenizer.num_training_bytes),
        root=root,
        for_encoder=for_encoder,
    )


def build_train_data(config: DataConfig, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> TrainData:
    """Return the training rows of a recipe, tokenising what is not cached.

    Safe on all ranks at once: one of them builds a cache, the others wait for it.

    Raises:
        ConfigError: The data does not exist, is empty or cannot be read.
        RunError: The hub does not answer, or the cache cannot be written.
    """
    root = cache_root(config.cache_dir)
    encoder, tokenizer_key = (
        Encoder(tokenizer, config.task, num_pieces=config.num_pieces),
        tokenizer_fingerprint(tokenizer),
    )
    pad_id = _pad_id(tokenizer)
    sources: list[Source] = []
    domains = open_domains(config, root)
    for index, documents in enumerate(domains):
        own_seed = (seed << 8) + index  # so that two copies of one text are not read in the same order
        if isinstance(documents, PreparedDomain):
            sources.append(MapSource(documents.store(tokenizer_key), documents, config, pad_id=pad_id, seed=own_seed))
        elif documents.streaming:
            stream = cast(StreamingDocuments, documents)
            sources.append(StreamSource(stream, encoder, config, pad_id=pad_id, seed=own_seed))
        else:
            store = token_store(documents, encoder, vocab_size=len(tokenizer), tokenizer_key=tokenizer_key, root=root)
            if config.task == "sentence_pairs":
                sources.append(SentenceRows(store, documents, config, pad_id=pad_id, seed=own_seed))
                continue
            sources.append(MapSource(store, documents, config, pad_id=pad_id, seed=own_seed))
    content = {"tokenizer": tokenizer_key, **{f"text of {s.name!r}": s.text_fingerprint for s in sources}}
    held_out = {f"held-out text of {d.name!r}": d.held_out_content for d in domains if d.held_out_content is not None}
    identity = data_identity(config, seed=seed, content=content, held_out=held_out)
    return TrainData(
        sources,
        sequence_length=config.sequence_length,
        seed=seed,
        identity=identity,
        pads_rows=keeps_documents_whole(config),
        masking=masking_of(config, tokenizer, seed=seed),
        subset=None if config.subset is None else RowSubset(config.subset, seed),
    )


def build_eval_data(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, *, tokens_per_domain: int
) -> list[EvalDomain]:
    """Return the held-out rows of each domain that has some.

    Args:
        config: The `data` section.
        tokenizer: What `build_tokenizer` returned.
        tokens_per_domain: Tokens of each domain, rounded down to whole rows; at least one row.

    Raises:
        ConfigError: A domain has nothing held out.
    """
    root = cache_root(config.cache_dir)
    encoder, pad_id = Encoder(tokenizer, config.task, num_pieces=config.num_pieces), _pad_id(tokenizer)
    if config.task == "sentence_pairs":
        found = (
            sentence_domain(documents, encoder, config, num_tokens=tokens_per_domain, pad_id=pad_id)
            for documents in open_domains(config, root)
        )
        return [domain for domain in found if domain is not None]
    eval_domain_of = partial(
        eval_domain, key=tokenizer_fingerprint(tokenizer), root=root, masking=masking_of(config, tokenizer, seed=0)
    )
    domains = [
        eval_domain_of(documents, encoder, config, num_tokens=tokens_per_domain, pad_id=pad_id)
        for documents in open_domains(config, root)
    ]
    return [domain for domain in domains if domain is not None]


def open_domains(config: DataConfig, root: Path) -> list[Documents]:
    """Open every domain, of text and of prepared folders.

    Raises:
        ConfigError: See `open_documents` and `open_prepared`; or two domains have one name.
    """
    domains = open_documents(config, root)
    prepared = [source for source in sources_of(config) if isinstance(source, Prepared)]
    domains += [domain for source in prepared for domain in open_prepared(source, config)]
    check_names(domains)
    return domains


def _training_text(domains: list[Documents], num_bytes: int) -> Iterator[str]:
    """Text of every domain in proportion to its weight, at most `num_bytes` together."""
    total = sum(domain.weight for domain in domains)
    for domain in domains:
        left = num_bytes * domain.weight / total
        for document in domain.train():
            if left <= 0:
                break
            yield from _texts(document)
            left -= num_chars(document)


def _texts(document: Document) -> Iterator[str]:
    if isinstance(document, str):
        yield document
        return
    if isinstance(document, SentencePair):
        yield from document.texts
        return
    turns = document.prompt + document.chosen + document.rejected if isinstance(document, Pair) else document
    yield from (turn["content"] for turn in turns if isinstance(turn.get("content"), str))


def _pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
