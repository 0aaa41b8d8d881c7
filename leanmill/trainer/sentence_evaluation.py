"""How well vectors of held-out texts say which belong together: retrieval, and rank correlation with scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leanmill.data.evaluation import EvalDomain
from leanmill.parallel.collectives import sum_over_ranks
from leanmill.parallel.engine import Engine
from leanmill.report.observer import DomainScore


TEMPERATURE = 0.05
"""Of the held-out loss, whatever a recipe trains with: so that runs compare."""
_CHUNK_ROWS = 512


def score_sentences(
    engine: Engine, domains: Sequence[EvalDomain], batches: Mapping[str, Sequence[tuple[int, Mapping[str, Tensor]]]]
) -> tuple[dict[str, DomainScore], dict[str, float]]:
    """Return the score of each domain and of `all`, and metrics `sentences/metric/domain` with means. A collective.

    Args:
        engine: Prepared; its module gives vectors of texts.
        domains: Held-out pairs.
        batches: By domain, this rank's batches, as many on every rank, behind the number of their first row.
    """
    scores: dict[str, DomainScore] = {}
    metrics: dict[str, float] = {}
    by_metric: dict[str, list[float]] = {}
    for domain in domains:
        vectors = _vectors(engine, len(domain.rows["input_ids"]), batches[domain.name])
        found = measures(vectors, domain.rows)
        loss = found.pop("loss")
        scores[domain.name] = _score(loss, len(vectors))
        for name, value in found.items():
            metrics[f"sentences/{name}/{domain.name}"] = value
            by_metric.setdefault(name, []).append(value)
    metrics |= {f"sentences/{name}": sum(values) / len(values) for name, values in by_metric.items()}
    if scores:
        total = sum(score.num_tokens for score in scores.values())
        scores["all"] = _score(sum(one.loss * one.num_tokens for one in scores.values()) / total, total)
    return scores, metrics


def measures(vectors: Tensor, rows: Mapping[str, Tensor]) -> dict[str, float]:
    """Return what vectors are worth, by metric.

    Of pairs without a score, each first text looks for its second among those of all and all hard negatives:
    `retrieval_accuracy`, `mean_reciprocal_rank` (a text that occurs twice counts as itself, others that are as near
    come before it) and the cross-entropy of
    cosines / `TEMPERATURE`. Of pairs with one, `spearman` of it with their cosines. `loss` is that cross-entropy, and
    where all pairs have scores 1 - `spearman`.

    Args:
        vectors: fp32 [R, texts, H].
        rows: Of a domain.
    """
    vectors, given = F.normalize(vectors.float(), dim=-1), rows["scores"][:, 0]
    has_score, found = ~torch.isnan(given), dict[str, float]()
    if int(has_score.sum()) > 1:
        cosines = (vectors[has_score, 0] * vectors[has_score, 1]).sum(-1)
        found["spearman"] = spearman(cosines, given[has_score])
        found["loss"] = 1 - found["spearman"]
    if not has_score.all():
        lengths, plain = rows["text_lengths"], ~has_score
        texts = _numbers(rows["input_ids"].view(*lengths.shape, -1), lengths)
        found |= _retrieval(vectors[plain], texts[plain], lengths[plain] > 0)
    return found


def spearman(one: Tensor, other: Tensor) -> float:
    """Return the correlation of ranks, ties at their mean rank; 0 where one is constant, NaN where one has a NaN."""
    if bool(one.isnan().any() or other.isnan().any()):
        return float("nan")
    ranks = torch.stack([_ranks(one), _ranks(other)])
    ranks = ranks - ranks.mean(1, keepdim=True)
    lengths = ranks.norm(dim=1)
    return float((ranks[0] @ ranks[1]) / (lengths[0] * lengths[1])) if lengths.all() else 0.0


def _ranks(values: Tensor) -> Tensor:
    _, number, counts = values.double().unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0).double() - (counts - 1) / 2)[number]


def _retrieval(vectors: Tensor, texts: Tensor, is_there: Tensor) -> dict[str, float]:
    keys, key_texts, is_key = vectors[:, 1:].flatten(0, 1), texts[:, 1:].flatten(), is_there[:, 1:].flatten()
    own_keys = torch.arange(len(vectors)) * (vectors.shape[1] - 1)
    losses, places = [], []
    for start in range(0, len(vectors), _CHUNK_ROWS):
        part = slice(start, start + _CHUNK_ROWS)
        own = texts[part, 1]
        cosines = vectors[part, 0] @ keys.T
        # Of the same product as the others', so that equal vectors have equal cosines.
        mine = cosines.gather(1, own_keys[part, None])[:, 0]
        is_other = is_key & (key_texts != own[:, None])
        others = cosines.masked_fill(~is_other, -torch.inf)
        scaled = torch.cat([mine[:, None], others], 1) / TEMPERATURE
        losses.append(scaled.logsumexp(1) - scaled[:, 0])
        # A tie is no find: vectors that are all alike, or no numbers, tell no text from another.
        places.append(1 + (is_other & ~(cosines < mine[:, None])).sum(1))
    place = torch.cat(places).double()
    return {
        "retrieval_accuracy": float((place == 1).double().mean()),
        "mean_reciprocal_rank": float((1 / place).mean()),
        "loss": float(torch.cat(losses).double().mean()),
    }


def _numbers(ids: Tensor, lengths: Tensor) -> Tensor:
    """Number texts [R, texts, L] so that equal ones have equal numbers."""
    shown = ids.masked_fill(torch.arange(ids.shape[-1]) >= lengths[..., None], -1)
    _, numbers = shown.flatten(0, 1).unique(dim=0, return_inverse=True)
    return numbers.view(lengths.shape)


def _vectors(engine: Engine, num_rows: int, batches: Sequence[tuple[int, Mapping[str, Tensor]]]) -> Tensor:
    """Return the vectors of all rows, fp32 [R, texts, H] on the CPU, on every rank."""
    found: Tensor | None = None
    for first, batch in batches:
        part = engine.evaluate(batch, wanted="embeddings")["embeddings"].float().cpu()
        found = torch.zeros(num_rows, *part.shape[1:]) if found is None else found
        here = found[first : first + len(part)]
        here.copy_(part[: len(here)])
    assert found is not None
    return sum_over_ranks(found.to(engine.device)).cpu()


def _score(loss: float, num_pairs: int) -> DomainScore:
    return DomainScore(
        loss=loss if math.isfinite(loss) else math.inf,
        perplexity=None,
        bits_per_byte=None,
        order0_bits_per_byte=None,
        num_tokens=num_pairs,
    )
