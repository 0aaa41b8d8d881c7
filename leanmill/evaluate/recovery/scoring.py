"""PASER over prepared data: what two models make of every document, then which of them are trained on.

He et al. 2025, "PASER: Post-Training Data Selection for Efficient Pruned Large Language Model Recovery"
(arXiv:2502.12594).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leanmill.checkpoint.fingerprint import fingerprint_folder
from leanmill.core.errors import RunError
from leanmill.core.paths import expand_user
from leanmill.data.config import DataConfig, Prepared
from leanmill.data.prepared import TOKENIZER, PreparedDomain
from leanmill.data.selection import score_file
from leanmill.data.shard_writer import sync
from leanmill.data.tokenizer import load_tokenizer
from leanmill.evaluate.document_scores import begin_together, check_models, facts_of, prepared_domains
from leanmill.evaluate.models import open_for_evaluation
from leanmill.evaluate.recovery.choice import Features, chosen_documents
from leanmill.evaluate.recovery.concepts import concepts_of


_TOKENS_AT_ONCE = 256
"""Whose probabilities are in memory in fp64."""


def measure_documents(
    config: DataConfig,
    out: Path,
    *,
    teacher: Path,
    reference: Path,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    tell: Callable[[str], None] = print,
) -> None:
    """Write what the models make of every training document of a prepared folder; shards that are there are kept.

    Ranks share the shards and wait for each other at the start alone.

    Args:
        config: The `data` section; its source is prepared. Of long documents the first `sequence_length` tokens count.
        out: A new folder, or one of the same data and models.
        teacher: Hugging Face folder of the model before it was pruned.
        reference: Of the model after.
        device: Where the models run.
        rank: This process.
        world_size: How many share the shards.
        tell: Called with a line at the end of every shard.

    Raises:
        ConfigError: The data is not prepared text or conversations, a model has another tokenizer, or `out` is of
            something else.
        RunError: A model gives no number.
    """
    paths = {"teacher": teacher, "reference": reference}
    check_models(config, paths, tasks=("pretrain", "sft"))
    domains = prepared_domains(config, tasks=("pretrain", "sft"))
    whole, pruned = (open_for_evaluation(path, device).model for path in (teacher, reference))
    facts = {"tokenizer": domains[0].tokenizer_key, "sequence_length": config.sequence_length, "chooses": True}
    facts |= {name: fingerprint_folder(path) for name, path in paths.items()}
    begin_together(out, {**facts, "domains": [facts_of(domain, index) for index, domain in enumerate(domains)]}, rank)
    work = [(domain, index, shard) for index, domain in enumerate(domains) for shard in range(domain.num_shards)]
    for domain, index, shard in work[rank::world_size]:
        path = _features_file(out, index, shard)
        if path.is_file():
            continue
        documents, targets = domain.shard_documents(shard), domain.shard_targets(shard)
        found = features_of(whole, pruned, documents, targets, config.sequence_length)
        if np.isnan(found.degradation).all() or np.isinf(found.degradation).any():
            raise RunError(f"shard {shard} of {domain.name!r} has no finite scores; check the weights of both models")
        _save(path, embeddings=found.embeddings, degradation=found.degradation, lengths=found.lengths)
        mean = float(np.nanmean(found.degradation))
        tell(f"{domain.name}: shard {shard + 1:,} of {domain.num_shards:,}, mean divergence {mean:.4f} nats")


def choose_documents(
    config: DataConfig, out: Path, *, kept_share: float, num_clusters: int, seed: int, tell: Callable[[str], None]
) -> None:
    """Write which documents are trained on, once every shard has been measured; by one process.

    Args:
        config: See `measure_documents`.
        out: See there.
        kept_share: The budget, as a share of each domain's documents.
        num_clusters: Groups of each domain's documents, at most.
        seed: Of the groups.
        tell: Called with a line for every domain.
    """
    assert isinstance(config.source, Prepared)
    tokenizer = load_tokenizer(str(expand_user(config.source.path) / TOKENIZER))
    for index, domain in enumerate(prepared_domains(config, tasks=("pretrain", "sft"))):
        features = _read(out, index, domain.num_shards)
        texts = _Texts(domain, tokenizer)
        number = len(features.lengths)
        kept = chosen_documents(
            features, texts.concepts, budget=max(1, int(kept_share * number)), num_clusters=num_clusters, seed=seed
        )
        if not len(kept):
            raise RunError(
                f"{domain.name!r}: none of {number:,} documents is chosen; raise score.kept_share, or lower "
                f"score.num_clusters"
            )
        scores = np.full(number, np.nan)
        scores[kept] = features.degradation[kept]
        for shard, part in enumerate(np.split(scores, texts.ends[:-1])):
            _save(out / f"domain-{index}" / score_file(shard), part)
        tell(f"{domain.name}: {len(kept):,} of {number:,} documents chosen")


@torch.no_grad()
def features_of(
    whole: Any,
    pruned: Any,
    documents: Sequence[NDArray[Any]],
    targets: Sequence[NDArray[np.bool_]] | None,
    sequence_length: int,
) -> Features:
    """Return what the models make of documents.

    Args:
        whole: Causal LM before it was pruned, in eval mode; its hidden states say what a document is about.
        pruned: The one after.
        documents: Token ids, each [n].
        targets: Which of them are to be learned, each [n]; None is all but the first.
        sequence_length: Tokens that count of a document.
    """
    device = next(whole.parameters()).device
    embeddings, degradation = [], []
    for number, document in enumerate(documents):
        ids = torch.from_numpy(document[:sequence_length].astype(np.int64))[None].to(device)
        asked = torch.ones(ids.shape[1], dtype=torch.bool) if targets is None else _first(targets[number], ids.shape[1])
        before = whole(input_ids=ids, use_cache=False, output_hidden_states=True)
        is_about = asked if targets is None or bool(asked.all()) else ~asked
        embeddings.append(before.hidden_states[-1][0, is_about.to(device)].double().mean(0).cpu().numpy())
        after = pruned(input_ids=ids, use_cache=False).logits
        degradation.append(_mean_divergence(before.logits[0, :-1], after[0, :-1], asked[1:].to(device)))
    return Features(
        embeddings=np.stack(embeddings),
        degradation=np.asarray(degradation),
        lengths=np.asarray([min(len(one), sequence_length) for one in documents], dtype=np.int64),
    )


def _mean_divergence(ours: Tensor, theirs: Tensor, asked: Tensor) -> float:
    """Mean over the asked tokens of logits [S, V], in fp64 for a few at a time; NaN where none is asked."""
    pieces = zip(ours[asked].split(_TOKENS_AT_ONCE), theirs[asked].split(_TOKENS_AT_ONCE), strict=True)
    sums = [float(js_divergence(p.double(), q.double()).sum()) for p, q in pieces]
    return sum(sums) / int(asked.sum()) if asked.any() else float("nan")


def js_divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence of two softmaxes [...], nats, of logits [..., V]."""
    p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
    middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0, dtype=p.dtype))
    return ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1)) / 2


def _first(targets: NDArray[np.bool_], length: int) -> Tensor:
    return torch.from_numpy(np.array(targets[:length], dtype=np.bool_))


class _Texts:
    """What documents of a domain are about, by their number in it."""

    def __init__(self, domain: PreparedDomain, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Views into the shards, taken apart once: documents are asked for in any order.
        self._shards = [domain.shard_documents(shard) for shard in range(domain.num_shards)]
        self.ends = np.cumsum([len(documents) for documents in self._shards], dtype=np.int64)
        """Of each shard."""

    def concepts(self, number: int) -> frozenset[str]:
        """Return the concepts of a document's text."""
        shard = int(np.searchsorted(self.ends, number, side="right"))
        first = int(self.ends[shard - 1]) if shard else 0
        ids = self._shards[shard][number - first].tolist()
        return concepts_of(self._tokenizer.decode(ids, skip_special_tokens=True))


def _features_file(out: Path, domain: int, shard: int) -> Path:
    return out / f"domain-{domain}" / f"features-{shard:05d}.npz"


def _read(out: Path, domain: int, num_shards: int) -> Features:
    parts = [np.load(_features_file(out, domain, shard), allow_pickle=False) for shard in range(num_shards)]
    return Features(
        **{name: np.concatenate([part[name] for part in parts]) for name in ("embeddings", "degradation", "lengths")}
    )


def _save(path: Path, array: NDArray[np.float64] | None = None, **arrays: NDArray[Any]) -> None:
    """Write one array, or several by name, to a file that is there whole or not at all."""
    temporary = path.with_suffix(f".{os.getpid()}.part")
    with temporary.open("wb") as file:
        if array is None:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        else:
            np.save(file, array)
    sync(temporary)
    os.replace(temporary, path)
