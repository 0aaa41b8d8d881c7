"""Distillation as a loss term: the teacher's body once a micro-batch, its logits a chunk at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from leanmill.core.batches import Batch
from leanmill.core.errors import ConfigError
from leanmill.core.head import head_extras
from leanmill.core.paths import expand_user
from leanmill.core.technique import InstallContext
from leanmill.core.vocabulary import check_vocabulary
from leanmill.distill.logits.cache import TopKCache, open_cache
from leanmill.distill.logits.cached import CachedTeacher
from leanmill.distill.logits.divergence import KERNEL_KINDS, Kind, cached_divergence, divergence
from leanmill.kernels.linear_cross_entropy.chunks import rows_a_chunk
from leanmill.kernels.linear_kl.op import TeacherHead, TeacherLogits, TopK, linear_kl_and_cross_entropy


class DistillTerm:
    """T^2 x divergence between teacher and student, summed over tokens with a label.

    Args:
        context: Loads the teacher, and knows the student's vocabulary.
        teacher: Folder or hub name; None where all that it knows is `cached`.
        kind: See `divergence`.
        beta: See `divergence`; may be changed between steps.
        temperature: T.
        top_k: See `divergence`.
        weight: Of the loss, beside cross-entropy's.
    """

    name = "distill"

    def __init__(
        self,
        context: InstallContext,
        *,
        teacher: str | None,
        kind: Kind = "forward_kl",
        beta: float = 0.5,
        temperature: float = 1.0,
        top_k: int | None = None,
        weight: float = 1.0,
    ) -> None:
        self.teacher_path, self.kind, self.beta, self.weight = teacher, kind, beta, weight
        self.temperature, self.top_k = temperature, top_k
        self.cached: CachedTeacher | None = None
        """Where its probabilities come from instead."""
        self._context, self._taps = context, None if teacher is None else context.taps(teacher)
        self._is_checked = False

    @property
    def teacher(self) -> nn.Module:
        """The frozen teacher, loaded when first asked for.

        Raises:
            ConfigError: Its vocabulary is not the student's.
        """
        assert self._taps is not None
        teacher: nn.Module = self._taps.model
        if not self._is_checked:
            self._check(teacher)
            self._is_checked = True
        return teacher

    def prepare(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return the teacher's last hidden states [B, S, hidden of the teacher], or its cached probabilities."""
        return {"teacher_hidden": self._last_of(batch)} if self.cached is None else self.cached.extras(batch)

    def _last_of(self, batch: Batch) -> Tensor:
        assert self.teacher is not None  # checked before it runs
        assert self._taps is not None
        return self._taps.read(batch).last

    @torch.no_grad()
    def top_k_of(self, batch: Batch) -> TopK:
        """Return the teacher's largest probabilities [B, S, k] of a micro-batch; a collective where it is sharded."""
        assert self.top_k is not None
        hidden = self._last_of(batch)
        head: Any = self.teacher.get_output_embeddings()  # type: ignore[operator]
        shared = min(self.teacher.config.vocab_size, self._context.vocab_size)  # type: ignore[union-attr, type-var]
        flat = hidden.flatten(0, 1)
        parts = flat.split(rows_a_chunk(flat, head.weight, None, logits_alive=2))
        found = [TopK.of(head(part)[:, :shared], self.top_k, self.temperature) for part in parts]
        shape = hidden.shape[:2]
        return TopK(
            torch.cat([one.indices for one in found]).unflatten(0, shape),
            torch.cat([one.log_probs for one in found]).unflatten(0, shape),
            torch.cat([one.log_tail for one in found if one.log_tail is not None]).unflatten(0, shape),
        )

    def __call__(self, logits: Tensor, labels: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        """See `LossTerm`; the teacher's logits [N, V] live as long as this call."""
        if self.cached is not None:
            per_token = cached_divergence(
                logits, _top_k(extras), kind=self.kind, temperature=self.temperature, beta=self.beta
            )
            return torch.where(labels != -100, per_token, 0.0).sum()
        with torch.no_grad():
            teacher_logits = self.teacher.get_output_embeddings()(extras["teacher_hidden"])  # type: ignore[operator]
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
            teacher=self._teacher_head(extras["teacher_hidden"]) if self.cached is None else _top_k(extras),
            divergence_weight=self.weight,
            cross_entropy_weight=cross_entropy_weight,
            kind=KERNEL_KINDS[self.kind],
            beta=self.beta,
            temperature=self.temperature,
            chunk_tokens=chunk_tokens,
        )
        return found.total, found.cross_entropy, found.divergence

    def _teacher_head(self, hidden: Tensor) -> TeacherHead | TeacherLogits:
        head: Any = self.teacher.get_output_embeddings()  # type: ignore[operator]
        if type(head) is not nn.Linear:
            return TeacherLogits(lambda part: head(hidden[part]), self.top_k)
        device_type = hidden.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else head.weight.dtype
        bias = None if head.bias is None else head.bias.to(dtype)
        return TeacherHead(hidden.to(dtype), head.weight.to(dtype), bias, self.top_k)

    def _check(self, teacher: Any) -> None:
        extras = head_extras(teacher.config)
        if extras:
            raise ConfigError(
                f"teacher {self.teacher_path} changes its logits after the head ({', '.join(extras)}), which "
                f"distill does not cover; choose a teacher of another family"
            )
        assert self.teacher_path is not None
        check_vocabulary(self._context, self.teacher_path, teacher.config.vocab_size, role="teacher")
        shared = min(teacher.config.vocab_size, self._context.vocab_size)
        if self.top_k is not None and self.top_k > shared:
            raise ConfigError(
                f"distill.top_k {self.top_k} is more than the {shared} tokens that teacher and student share; set "
                f"less, or remove top_k to compare all"
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
        if term.teacher_path is None:
            return open_cache(folder, wanted, writes=False)
        digest = context.fingerprint_of_model
        wanted["teacher"] = term.teacher_path
        wanted["teacher_weights"] = None if digest is None else digest(term.teacher_path)
        return open_cache(folder, wanted, writes=True)

    term.cached = CachedTeacher(folder, opened, None if term.teacher_path is None else term.top_k_of)
    return term.cached


def _top_k(extras: Mapping[str, Tensor]) -> TopK:
    return TopK(extras["teacher_indices"], extras["teacher_log_probs"], extras["teacher_log_tail"])
