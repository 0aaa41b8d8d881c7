"""Sinkhorn distance between a teacher's and a student's distributions over a batch of tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from leanmill.core.batches import Batch
from leanmill.core.losses import check_whole_groups
from leanmill.distill.logits.teachers import Teachers


_NEVER = -1e30
"""Log of what takes no part; a finite number, since the gradient of an infinite one would be NaN."""


class SinkhornTerm:
    """T^2 x the cost of moving a student's distributions to a teacher's, batch by batch, see `sinkhorn_cost`.

    A batch is `group_tokens` neighbouring positions of one row, those with a label. A row is never cut, so what is
    compared depends on no micro-batch, accumulation or number of ranks.

    Args:
        teachers: The teachers.
        group_tokens: Positions of a batch; divides the tokens of a row.
        entropy: See `sinkhorn_cost`.
        iterations: See `sinkhorn_cost`.
        temperature: T.
        weight: Of the loss, beside cross-entropy's.
    """

    name = "distill"

    def __init__(
        self,
        teachers: Teachers,
        *,
        group_tokens: int,
        entropy: float,
        iterations: int,
        temperature: float,
        weight: float,
    ) -> None:
        self.teachers, self.group_tokens, self.weight = teachers, group_tokens, weight
        self.entropy, self.iterations, self.temperature = entropy, iterations, temperature

    def prepare(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return the teachers' last hidden states.

        Raises:
            ConfigError: A row is no whole number of batches.
        """
        check_whole_groups("distill.batch_tokens", self.group_tokens, batch)
        return self.teachers.hidden_of(batch)

    def __call__(self, logits: Tensor, labels: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        """See `GroupLossTerm`."""
        of_teacher = self.teachers.logits(extras)
        size = min(logits.shape[-1], of_teacher.shape[-1])
        student, teacher = (
            (given[..., :size].float() / self.temperature).softmax(-1).unflatten(0, (-1, self.group_tokens))
            for given in (logits, of_teacher)
        )
        valid = (labels != -100).unflatten(0, (-1, self.group_tokens))
        cost = sinkhorn_cost(student, teacher, valid, entropy=self.entropy, iterations=self.iterations)
        return self.temperature**2 * cost.sum()


def sinkhorn_cost(student: Tensor, teacher: Tensor, valid: Tensor, *, entropy: float, iterations: int) -> Tensor:
    """Return sum_ij P_ij C_ij of each batch, with C_ij = |q_i - p_j|_1 of the student's q_i and the teacher's p_j.

    P starts as exp(-C / `entropy`), and its rows and then its columns are divided by their sums, over and over
    (Cui et al. 2024, arXiv:2402.17110, eq. 7 to 11): a plan of optimal transport with an entropy, one unit of mass a
    token. Gradients flow through the iterations, as in the authors' code. Alone in its batch, a token costs twice the
    total variation.

    Args:
        student: Probabilities [G, N, V], fp32 or fp64.
        teacher: The same, without gradients.
        valid: bool [G, N], the tokens that are there.
        entropy: Weight of the entropy; smaller plans are sharper, and take more iterations.
        iterations: How often rows and columns are normalised.

    Returns:
        [G].
    """
    cost = torch.cdist(student, teacher, p=1.0)
    is_pair = valid.unsqueeze(-1) & valid.unsqueeze(-2)
    kernel = (-cost / entropy).masked_fill(~is_pair, _NEVER)
    # Potentials of rows [G, N, 1] and of columns [G, 1, N].
    columns = torch.zeros_like(kernel[:, :1])
    rows = torch.zeros_like(kernel[..., :1])
    for _ in range(iterations):
        rows = torch.where(valid.unsqueeze(-1), -(kernel + columns).logsumexp(-1, keepdim=True), 0.0)
        columns = torch.where(valid.unsqueeze(-2), -(kernel + rows).logsumexp(-2, keepdim=True), 0.0)
    plan = (kernel + rows + columns).exp()
    return torch.where(is_pair, plan * cost, 0.0).sum((-2, -1))
