"""Tokenising the data of a recipe once, in shards, to a folder that recipes refer to.

A preparation that was ended goes on behind its last whole shard: documents before that are read again, not tokenised,
and their digest must be what it was.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanmill.core.errors import ConfigError
from leanmill.data.build import build_tokenizer
from leanmill.data.cache import cache_root, fingerprint, read_json
from leanmill.data.config import DataConfig, HfDataset, Prepared, sources_of
from leanmill.data.documents import open_documents
from leanmill.data.encoding import Encoder
from leanmill.data.prepared import MANIFEST, TOKENIZER, VERSION
from leanmill.data.shard_writer import DomainWriter, sync, write_whole
from leanmill.data.store import MISMATCH_VERSION
from leanmill.data.tokenizer import tokenizer_fingerprint


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


_PLAN, _LOCK = "plan.json", ".lock"


@dataclass(frozen=True)
class PreparedData:
    """What a preparation came to."""

    folder: Path
    num_tokens: int
    """Of training, all domains."""
    num_shards: int
    num_kept: int
    """Shards that an earlier, ended preparation had written."""


def prepare_data(
    config: DataConfig, out: Path, *, seed: int = 0, shard_tokens: int = 1 << 26, tell: Callable[[str], None] = print
) -> PreparedData:
    """Tokenise all training documents of a recipe, and keep held-out ones, in `out`.

    Args:
        config: The `data` section.
        out: A new folder, one whose preparation was ended, or one that is finished already.
        seed: See `build_tokenizer`.
        shard_tokens: About how many tokens a shard has.
        tell: Called with a line at the end of every shard.

    Raises:
        ConfigError: The data cannot be read, is a stream, or `out` holds something else.
    """
    _check_sources(config)
    tokenizer = build_tokenizer(config, seed=seed)
    domains = open_documents(config, cache_root(config.cache_dir))
    encoder = Encoder(tokenizer, config.task, num_pieces=config.num_pieces)
    kind = _kind(config, tokenizer)
    plan = {"kind": kind, "shard_tokens": shard_tokens, "domains": [[d.name, d.key] for d in domains]}
    with _own(out, plan):
        _keep_tokenizer(tokenizer, out / TOKENIZER)
        found = [
            DomainWriter(documents, encoder, out / f"domain-{index}", kind, shard_tokens, tell).prepare()
            for index, documents in enumerate(domains)
        ]
        facts = [one for one, _ in found]
        content = [[one["text"], one["shards"]] for one in facts]
        manifest = {"version": VERSION, "kind": kind, "domains": facts, "fingerprint": fingerprint([kind, content])}
        write_whole(out / MANIFEST, manifest)
    return PreparedData(
        folder=out,
        num_tokens=sum(sum(one["shards"]) for one in facts),
        num_shards=sum(len(one["shards"]) for one in facts),
        num_kept=sum(kept for _, kept in found),
    )


def _check_sources(config: DataConfig) -> None:
    if config.task == "sentence_pairs":
        raise ConfigError("data.task: sentence_pairs needs no preparing; train with the recipe as it is")
    for source in sources_of(config):
        if isinstance(source, Prepared):
            raise ConfigError(f"data.source: {source.path!r} is prepared already; give the recipe with its text")
        if isinstance(source, HfDataset) and source.streaming:
            raise ConfigError(f"data.source: {source.name!r} is a stream; set its streaming to false to prepare it")


def _kind(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What decides which tokens a document becomes, and how they lie."""
    dtype = "uint16" if len(tokenizer) <= 1 << 16 else "uint32"
    key = tokenizer_fingerprint(tokenizer)
    kind = {"task": config.task, "num_pieces": config.num_pieces, "tokenizer": key, "dtype": dtype}
    return {**kind, "mismatch": MISMATCH_VERSION} if config.mismatched_answers else kind


@contextmanager
def _own(out: Path, plan: dict[str, Any]) -> Iterator[None]:
    """Hold the folder for one preparation of this plan."""
    path = out / _PLAN
    if out.exists() and not path.is_file() and (not out.is_dir() or _is_used(out)):
        raise ConfigError(f"{out} is there already and holds no prepared data; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    with (out / _LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"{out} is being prepared by another process; wait for it, or name a new folder"
            ) from error
        if path.is_file() and read_json(path) != plan:
            raise ConfigError(
                f"{out} was prepared from other text, another tokenizer or with other settings; name a new folder"
            )
        write_whole(path, plan)
        yield


def _is_used(out: Path) -> bool:
    """Whether a folder without a plan holds more than a preparation does that was ended before it wrote one."""
    return any(path.name not in (_LOCK, f"{_PLAN}.part") for path in out.iterdir())


def _keep_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer, whole or not at all."""
    if folder.is_dir():
        return
    temporary = folder.with_suffix(".part")
    tokenizer.save_pretrained(temporary)
    for path in temporary.iterdir():
        sync(path)
    os.replace(temporary, folder)
