"""Ranks that would read different text or count in different tokens, found before the first step."""

from __future__ import annotations

import hashlib
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from leanmill.core.errors import ConfigError
from leanmill.data.evaluation import EvalDomain
from leanmill.data.identity import Identity
from leanmill.parallel.collectives import gather_objects, same_on_all_ranks


_MAX_RANKS = 8
"""Ranks that a message names one by one."""


def check_ranks_agree(identity: Identity, domains: Sequence[EvalDomain]) -> None:
    """Compare tokenizer, training rows and held-out rows over all ranks; every rank must call it.

    Raises:
        ConfigError: Some differ, on every rank with the same line: which ranks, on which machines, in what.
    """
    mine = {**identity.settings, **identity.content, **{f"held-out text of {d.name!r}": _digest(d) for d in domains}}
    if not same_on_all_ranks(mine):
        raise ConfigError(_difference(gather_objects([socket.gethostname(), mine])))


def _difference(everyone: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Say which ranks differ from the majority (from rank 0 where there is none)."""
    facts = [tuple(sorted((key, str(value)) for key, value in given.items())) for _, given in everyone]
    usual = Counter(facts).most_common(1)[0][0]
    odd = [rank for rank, given in enumerate(facts) if given != usual]
    keys = sorted({key for rank in odd for key, _ in set(facts[rank]) ^ set(usual)})
    hosts = sorted({everyone[rank][0] for rank in odd})
    more = f" and {len(odd) - _MAX_RANKS} more" if len(odd) > _MAX_RANKS else ""
    return (
        f"{'ranks' if len(odd) > 1 else 'rank'} {', '.join(map(str, odd[:_MAX_RANKS]))}{more} of {len(everyone)} "
        f"(on {', '.join(hosts[:_MAX_RANKS])}) would train on other data than the others: {', '.join(keys)} differ; "
        f"give every machine the same files, recipe and packages (local_corpus is the text of the packages), or name "
        f"files that all of them see with data.source={{type: hf, path: ...}} and data.tokenizer.path"
    )


def _digest(domain: EvalDomain) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(domain.rows):
        digest.update(domain.rows[name].numpy().tobytes())
    return digest.hexdigest()
