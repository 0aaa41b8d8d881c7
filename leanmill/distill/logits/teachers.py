"""Frozen teachers whose logits are made from their last hidden states, a chunk of tokens at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leanmill.core.batches import Batch, Score
from leanmill.core.frozen_head import FrozenHead
from leanmill.core.technique import InstallContext
from leanmill.kernels.linear_cross_entropy.chunks import rows_a_chunk
from leanmill.kernels.linear_kl.op import TeacherHead, TeacherLogits, TopK


class Teachers:
    """One teacher, or several whose distributions are averaged.

    With weights w_m that sum to 1, probabilities are p = sum_m w_m softmax(z_m / T) (Hinton et al. 2015,
    arXiv:1503.02531, section 3), and logits those whose softmax(z / T) is p.

    Args:
        context: Loads them, and knows the student's vocabulary.
        paths: Folders or hub names.
        weights: One a teacher, above 0, of any sum; None weighs all alike.
        temperature: T.
        of_logits: Average logits themselves, for a loss of logits.
    """

    def __init__(
        self,
        context: InstallContext,
        paths: Sequence[str],
        weights: Sequence[float] | None = None,
        temperature: float = 1.0,
        *,
        of_logits: bool = False,
    ) -> None:
        self._context, self.temperature, self._of_logits = context, temperature, of_logits
        self.members = [FrozenHead(context, path, technique="distill", role="teacher") for path in paths]
        weights = [1.0] * len(paths) if weights is None else weights
        self.weights = [weight / sum(weights) for weight in weights]

    @property
    def name(self) -> str:
        """The members in words, with their weights where there are several."""
        if len(self.members) == 1:
            return self.members[0].path
        pairs = zip(self.members, self.weights, strict=True)
        return " + ".join(f"{weight:.6g} x {member.path}" for member, weight in pairs)

    @property
    def vocabulary(self) -> int:
        """Rows that the heads of all members and the student have."""
        return min(self._context.vocab_size, *(member.model.config.vocab_size for member in self.members))

    def hidden_of(self, batch: Batch) -> dict[str, Tensor]:
        """Return the last hidden states [B, S, H] of each member, by the names that `logits` reads."""
        return {_key(index): member.last_of(batch) for index, member in enumerate(self.members)}

    @torch.no_grad()
    def logits(self, hidden: Mapping[str, Tensor]) -> Tensor:
        """Return logits [N, vocabulary] of hidden states [N, H]; of several teachers at least fp32."""
        size = self.vocabulary
        found: list[Tensor] = [
            member.head(hidden[_key(index)])[..., :size] for index, member in enumerate(self.members)
        ]
        if len(found) == 1:
            return found[0]
        if self._of_logits:
            pairs = zip(found, self.weights, strict=True)
            return torch.stack(
                [weight * (one if one.dtype == torch.float64 else one.float()) for one, weight in pairs]
            ).sum(0)
        return mean_logits(found, self.weights, self.temperature)

    def head(self, hidden: Mapping[str, Tensor], top_k: int | None) -> TeacherHead | TeacherLogits:
        """Return what the kernels take a teacher by, given hidden states [N, H]."""
        first = self.members[0].head
        if len(self.members) > 1 or type(first) is not nn.Linear:
            return TeacherLogits(lambda part: self.logits({name: h[part] for name, h in hidden.items()}), top_k)
        device_type = hidden[_key(0)].device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else first.weight.dtype
        bias = None if first.bias is None else first.bias.to(dtype)
        return TeacherHead(hidden[_key(0)].to(dtype), first.weight.to(dtype), bias, top_k)

    @torch.no_grad()
    def top_k_of(self, batch: Batch, top_k: int) -> TopK:
        """Return the largest probabilities [B, S, k] of a micro-batch; a collective where a teacher is sharded."""
        hidden = self.hidden_of(batch)
        shape = hidden[_key(0)].shape[:2]
        flat = {name: states.flatten(0, 1) for name, states in hidden.items()}
        head: Any = self.members[0].head
        chunk = rows_a_chunk(flat[_key(0)], head.weight, None, logits_alive=2 * len(self.members))
        found = [
            TopK.of(self.logits({name: h[start : start + chunk] for name, h in flat.items()}), top_k, self.temperature)
            for start in range(0, shape.numel(), chunk)
        ]
        return TopK(
            torch.cat([one.indices for one in found]).unflatten(0, shape),
            torch.cat([one.log_probs for one in found]).unflatten(0, shape),
            torch.cat([one.log_tail for one in found if one.log_tail is not None]).unflatten(0, shape),
        )

    def probability_of_labels(self, batch: Batch, score: Score) -> Tensor:
        """Return the probability of every label, [B, S] fp64, at temperature 1."""
        each = [
            weight * score(batch, member.model).double().neg().exp()
            for member, weight in zip(self.members, self.weights, strict=True)
        ]
        return torch.stack(each).sum(0)


def mean_logits(logits: Sequence[Tensor], weights: Sequence[float], temperature: float) -> Tensor:
    """Return logits z with softmax(z / T) = sum_m w_m softmax(z_m / T), at least fp32.

    Args:
        logits: [..., V] a teacher, any float dtype.
        weights: One a teacher, with sum 1.
        temperature: T.
    """
    total: Tensor | None = None
    for one, weight in zip(logits, weights, strict=True):
        exact = one if one.dtype == torch.float64 else one.float()
        mine = (exact / temperature).log_softmax(-1).add_(math.log(weight))
        total = mine if total is None else torch.logaddexp(total, mine)
    assert total is not None
    return total * temperature


def _key(index: int) -> str:
    return "teacher_hidden" if index == 0 else f"teacher_hidden_{index + 1}"
