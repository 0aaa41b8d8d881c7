"""Training on the best documents of a prepared folder, by scores that `leanmill data score` wrote beside it.

A folder of scores holds `scores.json`, which says of what text, tokenizer and models they are, and in a folder a domain
one file of numbers for each shard of the prepared tokens. Documents are known by their place in the text, so the scores
also serve the same text as another tokenizer prepared it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanmill.core.errors import ConfigError
from leanmill.data.cache import fingerprint, read_json
from leanmill.data.store import Tokens, TokenStore


SCORES = "scores.json"


class ChosenTokens:
    """The tokens of some documents one behind the other, read where they lie.

    Args:
        tokens: Of all documents, [N].
        starts: Where each chosen document begins in them, [D].
        offsets: Boundaries of the chosen documents, [D + 1].
    """

    def __init__(self, tokens: Tokens, starts: NDArray[np.int64], offsets: NDArray[np.int64]) -> None:
        self._tokens, self._starts, self._offsets = tokens, starts, offsets

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def __getitem__(self, index: NDArray[np.int64]) -> NDArray[Any]:
        document = np.searchsorted(self._offsets, index, side="right") - 1
        return self._tokens[self._starts[document] + index - self._offsets[document]]


def best_documents(scores: NDArray[np.float64], lengths: NDArray[np.int64], kept_share: float) -> NDArray[np.int64]:
    """Return the numbers of the best documents, ascending: the fewest with `kept_share` of all tokens or more.

    Of equal scores the document that comes first is taken. One that has no score (NaN) comes last.

    Args:
        scores: [D], larger is better.
        lengths: Tokens of each document, [D].
        kept_share: In (0, 1].
    """
    order = np.argsort(-scores, kind="stable")  # NaN last
    filled = np.cumsum(lengths[order], dtype=np.int64)
    # Rounded down to a whole token: a share of 1/3 that is a bit more in binary asks for no further document.
    num_kept = int(np.searchsorted(filled, int(kept_share * int(filled[-1])))) + 1
    return np.sort(order[:num_kept])


def choose(store: TokenStore, scores: NDArray[np.float64], kept_share: float | None) -> tuple[TokenStore, int]:
    """Return the store with some of its documents only, and how many they are; its fingerprint says which.

    Args:
        store: All documents.
        scores: Of each.
        kept_share: Of all tokens, see `best_documents`; None takes every document that has a score.
    """
    lengths = np.diff(store.offsets)
    kept = np.flatnonzero(~np.isnan(scores)) if kept_share is None else best_documents(scores, lengths, kept_share)
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths[kept], dtype=np.int64)])
    tokens = ChosenTokens(store.tokens, store.offsets[kept], offsets)
    targets = None if store.is_target is None else ChosenTokens(store.is_target, store.offsets[kept], offsets)
    rows = None if store.rows is None else store.rows[kept]
    text = fingerprint([store.text_fingerprint, kept.tolist()])
    chosen = replace(store, tokens=tokens, is_target=targets, rows=rows, offsets=offsets, text_fingerprint=text)
    return chosen, len(kept)


def is_choice(folder: Path) -> bool:
    """Whether scores say which documents are trained on, all that have one, rather than which are better."""
    path = folder / SCORES
    return path.is_file() and bool(read_json(path).get("chooses"))


def read_scores(folder: Path, *, domain: str, text: str, num_documents: int) -> NDArray[np.float64]:
    """Return the scores of all documents of a domain, [D].

    Args:
        folder: What `leanmill data score` wrote.
        domain: Its name.
        text: Fingerprint of its text.
        num_documents: D.

    Raises:
        ConfigError: They are not finished, of other text, or cut.
    """
    if not (folder / SCORES).is_file():
        raise ConfigError(
            f"data.source.scores: {str(folder)!r} holds no scores; run `leanmill data score RECIPE --teacher MODEL "
            f"--reference MODEL --out {folder}`"
        )
    found = [one for one in read_json(folder / SCORES)["domains"] if (one["name"], one["text"]) == (domain, text)]
    if not found:
        raise ConfigError(
            f"data.source.scores: {str(folder)!r} has no scores of the text of {domain!r}; score this prepared folder"
        )
    paths = [folder / found[0]["folder"] / score_file(shard) for shard in range(found[0]["num_shards"])]
    if missing := [path for path in paths if not path.is_file()]:
        raise ConfigError(
            f"data.source.scores: {len(missing)} of {len(paths)} shards of {domain!r} have no scores yet, the first is "
            f"{missing[0]}; run the same `leanmill data score` again, it goes on where it was ended"
        )
    scores: NDArray[np.float64] = np.concatenate([np.load(path, allow_pickle=False) for path in paths])
    if len(scores) != num_documents:
        raise ConfigError(
            f"data.source.scores: {str(folder)!r} has {len(scores):,} scores of {domain!r} and the prepared data "
            f"{num_documents:,} documents; score them anew in another folder"
        )
    return scores


def score_file(shard: int) -> str:
    """Return the name of the file with the scores of a shard."""
    return f"scores-{shard:05d}.npy"
