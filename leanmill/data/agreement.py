"""Ranks that would read different text or count in different tokens, found before the first step."""

from __future__ import annotations

import hashlib
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from leanmill.core.errors import ConfigError, RunError
from leanmill.data.evaluation import EvalDomain
from leanmill.data.identity import Identity
from leanmill.parallel.collectives import gather_objects, same_on_all_ranks


T = TypeVar("T")

_MAX_RANKS = 8
"""Ranks that a message names one by one."""


def on_every_rank(build: Callable[[], T]) -> T:
    """Return `build()`; where it fails on some ranks it fails on all, so that none waits for another.

    Every rank must call it.

    Raises:
        ConfigError: `build` raised it on some rank; every rank says on which.
        RunError: The same.
    """
    result, failure = None, None
    try:
        result = build()
    except (ConfigError, RunError) as error:
        failure = error
    said = "" if failure is None else str(failure)
    if not same_on_all_ranks(said):
        everyone = gather_objects([socket.gethostname(), said, isinstance(failure, ConfigError)])
        failed = [(rank, *given) for rank, given in enumerate(everyone) if given[1]]
        _, _, message, is_config = failed[0]
        where = _ranks([(rank, host) for rank, host, said, _ in failed if said == message], len(everyone))
        raise (ConfigError if is_config else RunError)(f"{where}: {message}") from failure
    if failure is not None:
        raise failure
    return cast(T, result)


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
    where = _ranks([(rank, everyone[rank][0]) for rank in odd], len(everyone))
    return (
        f"{where} would train on other data than the others: {', '.join(keys)} differ; "
        f"give every machine the same files, recipe and packages (local_corpus is the text of the packages), or name "
        f"files that all of them see with data.source={{type: hf, path: ...}} and data.tokenizer.path"
    )


def _ranks(odd: Sequence[tuple[int, str]], world_size: int) -> str:
    """Name ranks and their machines: `ranks 2, 3 of 8 (on node-1)`."""
    shown, hosts = odd[:_MAX_RANKS], sorted({host for _, host in odd})[:_MAX_RANKS]
    more = f" and {len(odd) - len(shown)} more" if len(odd) > len(shown) else ""
    numbers = ", ".join(str(rank) for rank, _ in shown)
    return f"{'ranks' if len(odd) > 1 else 'rank'} {numbers}{more} of {world_size} (on {', '.join(hosts)})"


def _digest(domain: EvalDomain) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(domain.rows):
        digest.update(domain.rows[name].numpy().tobytes())
    return digest.hexdigest()
