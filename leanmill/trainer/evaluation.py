"""Held-out loss, perplexity and bits per byte, by domain."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leanmill.core.probes import Probe
from leanmill.data.build import EvalDomain
from leanmill.parallel.collectives import sum_over_ranks
from leanmill.parallel.engine import Engine
from leanmill.report.observer import DomainScore
from leanmill.trainer.sentence_evaluation import score_sentences


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one evaluation found."""

    scores: Mapping[str, DomainScore]
    """By domain, and `all` over all their tokens and bytes."""
    metrics: Mapping[str, float]
    """What probes report, as `probe/metric`."""
    tables: Mapping[str, Any]
    """What probes counted, by probe; JSON-able."""
    notes: tuple[str, ...]
    """What probes could not say."""


def evaluate(
    engine: Engine, domains: Sequence[EvalDomain], rows_per_batch: int, probes: Sequence[Probe] = ()
) -> Evaluation:
    """Score every domain; the rows are shared out over the data ranks.

    Args:
        engine: A prepared engine; all ranks call together.
        domains: Held-out rows, the same on every rank.
        rows_per_batch: Rows of one forward.
        probes: What looks on.
    """
    if any("text_lengths" in domain.rows for domain in domains):
        batches = {d.name: list(_batches(engine, d.rows, rows_per_batch)) for d in domains}
        scores, metrics = score_sentences(engine, domains, batches)
        return Evaluation(scores=scores, metrics=metrics, tables={}, notes=())
    for probe in probes:
        probe.take()  # whatever evaluated before, such as a reference model's scores, is not of these domains
    sums = {d.name: _sum_domain(engine, d.rows, rows_per_batch, probes) for d in domains}
    findings = [
        (probe.name, probe.find({domain: counts[index] for domain, (_, counts) in sums.items()}))
        for index, probe in enumerate(probes)
    ]
    return Evaluation(
        scores=_scores(domains, {name: total for name, (total, _) in sums.items()}),
        metrics={f"{name}/{key}": value for name, found in findings for key, value in found.metrics.items()},
        tables={name: found.table for name, found in findings if found.table},
        notes=tuple(note for _, found in findings for note in found.notes),
    )


def _scores(domains: Sequence[EvalDomain], totals: Mapping[str, tuple[float, int]]) -> dict[str, DomainScore]:
    scores = {d.name: _score(*totals[d.name], d.num_bytes, d.order0_bits_per_byte) for d in domains}
    if len(domains) > 1:
        num_bytes = sum(d.num_bytes for d in domains)
        order0 = sum(d.order0_bits_per_byte * d.num_bytes for d in domains) / num_bytes
        nats, tokens = (sum(column) for column in zip(*totals.values(), strict=True))
        scores["all"] = _score(nats, int(tokens), num_bytes, order0)
    elif domains:
        scores["all"] = scores[domains[0].name]
    return scores


def _sum_domain(
    engine: Engine, rows: Mapping[str, Tensor], rows_per_batch: int, probes: Sequence[Probe]
) -> tuple[tuple[float, int], list[Tensor]]:
    """Sum of nats and number of targets over all ranks, and what each probe counted."""
    total = torch.zeros(2, dtype=torch.float64)
    for _, batch in _batches(engine, rows, rows_per_batch):
        for probe in probes:
            probe.begin(batch)
        losses = engine.evaluate(batch)
        total[0] += losses["cross_entropy"].double().cpu()
        total[1] += (batch["labels"] != -100).sum().cpu()
    parts = [total, *(probe.take().double().cpu() for probe in probes)]
    (nats, tokens), *counts = (
        sum_over_ranks(torch.cat(parts).to(engine.device)).cpu().split([len(part) for part in parts])
    )
    return (float(nats), int(tokens)), counts


def _batches(
    engine: Engine, rows: Mapping[str, Tensor], rows_per_batch: int
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield this rank's batches on its device, behind the number of their first row.

    Every rank makes the same number of forwards, with empty labels past the end: forwards of a sharded module are
    collectives.
    """
    for start in range(0, rows["input_ids"].shape[0], rows_per_batch * engine.data_size):
        first = start + engine.data_rank * rows_per_batch
        yield first, {name: _cut(name, value, first, rows_per_batch).to(engine.device) for name, value in rows.items()}


def _cut(name: str, value: Tensor, first: int, num_rows: int) -> Tensor:
    part = value[first : first + num_rows]
    if part.shape[0] == num_rows:
        return part
    # The last rows stand in for missing ones; their labels are ignored.
    filler = value[-1:].expand(num_rows - part.shape[0], -1)
    if name == "labels":
        filler = torch.full_like(filler, -100)
    return torch.cat([part, filler])


def _score(nats: float, num_tokens: int, num_bytes: int, order0: float) -> DomainScore:
    loss = nats / max(num_tokens, 1)
    return DomainScore(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=nats / math.log(2) / max(num_bytes, 1),
        order0_bits_per_byte=order0,
        num_tokens=num_tokens,
    )
