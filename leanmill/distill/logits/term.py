"""Distillation as a loss term: the teacher's body once a micro-batch, its logits a chunk at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from leanmill.core.batches import Batch
from leanmill.core.errors import ConfigError
from leanmill.core.paths import expand_user
from leanmill.core.technique import InstallContext
from leanmill.distill.logits.cache import TopKCache, open_cache
from leanmill.distill.logits.cached import CachedTeacher
from leanmill.distill.logits.divergence import KERNEL_KINDS, cached_divergence, divergence
from leanmill.distill.logits.kinds import Kind
from leanmill.distill.logits.teachers import Teachers
from leanmill.kernels.linear_kl.op import TopK, linear_kl_and_cross_entropy


class DistillTerm:
    """T^2 x divergence between teacher and student, summed over tokens with a label.

    Args:
        teachers: The teacher, or several; None where all that it knows is `cached`.
        kind: See `divergence`.
        beta: See `divergence`; may be changed between steps.
        temperature: T.
        top_k: See `divergence`.
        weight: Of the loss, beside cross-entropy's.
    """

    name = "distill"

    def __init__(
        self,
        teachers: Teachers | None,
        *,
        kind: Kind = "forward_kl",
        beta: float = 0.5,
        temperature: float = 1.0,
        top_k: int | None = None,
        weight: float = 1.0,
    ) -> None:
        self.teachers, self.kind, self.beta, self.weight = teachers, kind, beta, weight
        self.temperature, self.top_k = temperature, top_k
        self.cached: CachedTeacher | None = None
        """Where its probabilities come from instead."""

    def prepare(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return the teacher's last hidden states [B, S, hidden of the teacher], or its cached probabilities."""
        if self.cached is not None:
            return self.cached.extras(batch)
        self._check_top_k()
        return self._known.hidden_of(batch)

    def top_k_of(self, batch: Batch) -> TopK:
        """Return the teacher's largest probabilities [B, S, k] of a micro-batch; a collective where it is sharded."""
        assert self.top_k is not None
        self._check_top_k()
        return self._known.top_k_of(batch, self.top_k)

    def __call__(self, logits: Tensor, labels: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        """See `LossTerm`; the teacher's logits [N, V] live as long as this call."""
        if self.cached is not None:
            per_token = cached_divergence(
                logits, _top_k(extras), kind=self.kind, temperature=self.temperature, beta=self.beta
            )
            return torch.where(labels != -100, per_token, 0.0).sum()
        teacher_logits = self._known.logits(extras)
        vocab_size = min(logits.shape[-1], teacher_logits.shape[-1])
        per_token = divergence(
            logits[..., :vocab_size],
            teacher_logits[..., :vocab_size],
            kind=self.kind,
            temperature=self.temperature,
            beta=self.beta,
            top_k=self.top_k,
        )
        return torch.where(labels != -100, per_token, 0.0).sum()

    def with_cross_entropy(
        self,
        head: tuple[Tensor, Tensor, Tensor | None],
        labels: Tensor,
        extras: Mapping[str, Tensor],
        *,
        cross_entropy_weight: float,
        chunk_tokens: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `HeadLossTerm`."""
        found = linear_kl_and_cross_entropy(
            head[0],
            head[1],
            labels,
            head[2],
            teacher=_top_k(extras) if self.cached is not None else self._known.head(extras, self.top_k),
            divergence_weight=self.weight,
            cross_entropy_weight=cross_entropy_weight,
            kind=KERNEL_KINDS[self.kind],
            beta=self.beta,
            temperature=self.temperature,
            chunk_tokens=chunk_tokens,
        )
        return found.total, found.cross_entropy, found.divergence

    @property
    def _known(self) -> Teachers:
        assert self.teachers is not None
        return self.teachers

    def _check_top_k(self) -> None:
        if self.top_k is not None and self.top_k > self._known.vocabulary:
            raise ConfigError(
                f"distill.top_k {self.top_k} is more than the {self._known.vocabulary} tokens that teacher and student "
                f"share; set less, or remove top_k to compare all"
            )


def cached_teacher(term: DistillTerm, context: InstallContext, path: str) -> CachedTeacher:
    """Return the rule that reads, and where there is a teacher writes, what `term` trains on from now on.

    Args:
        term: Its `cached` is set.
        context: Knows what data, tokenizer and teacher a cache must be of.
        path: Folder of the cache.
    """
    folder = expand_user(path)

    def opened(sequence_length: int) -> TopKCache:
        wanted: dict[str, Any] = {
            "data": context.data_fingerprint,
            "tokenizer": context.tokenizer_fingerprint,
            "top_k": term.top_k,
            "temperature": term.temperature,
            "sequence_length": sequence_length,
            "vocab_size": context.vocab_size,
        }
        if term.teachers is None:
            return open_cache(folder, wanted, writes=False)
        wanted["teacher"] = term.teachers.name
        wanted["teacher_weights"] = _weights_of(term.teachers, context)
        return open_cache(folder, wanted, writes=True)

    term.cached = CachedTeacher(folder, opened, None if term.teachers is None else term.top_k_of)
    return term.cached


def _weights_of(teachers: Teachers, context: InstallContext) -> str | None:
    """Digest of the weights of all teachers and their shares; None where one has none."""
    digest = context.fingerprint_of_model
    found = [None if digest is None else digest(member.path) for member in teachers.members]
    if None in found or len(found) == 1:
        return found[0] if len(found) == 1 else None
    pairs = zip(teachers.weights, found, strict=True)
    return " + ".join(f"{weight:.6g} x {one}" for weight, one in pairs)


def _top_k(extras: Mapping[str, Tensor]) -> TopK:
    return TopK(extras["teacher_indices"], extras["teacher_log_probs"], extras["teacher_log_tail"])
