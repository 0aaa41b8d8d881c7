"""BA-LoRA's regularisers as loss terms, sums over tokens (Chang et al. 2024, arXiv:2408.04556, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from leanmill.core.batches import Batch
from leanmill.core.frozen_head import FrozenHead
from leanmill.core.losses import check_whole_groups


_REFERENCE = "ba_lora_reference"


class Consistency:
    """KL(reference || model).

    Args:
        reference: The model before adaptation.
        weight: lambda 1.
    """

    name = "ba_lora_consistency"

    def __init__(self, reference: FrozenHead, weight: float) -> None:
        self.reference, self.weight = reference, weight

    def prepare(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return the reference's last hidden states [B, S, H]."""
        return {_REFERENCE: self.reference.last_of(batch)}

    def __call__(self, logits: Tensor, labels: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        """See `LossTerm`."""
        with torch.no_grad():
            theirs = self.reference.head(extras[_REFERENCE])
        size = min(logits.shape[-1], theirs.shape[-1])
        log_p = theirs[..., :size].float().log_softmax(-1)
        log_q = logits[..., :size].float().log_softmax(-1)
        return _over_labels((log_p.exp() * (log_p - log_q)).sum(-1), labels)


class Diversity:
    """Minus the entropy of the model's distribution.

    Args:
        weight: lambda 2.
    """

    name = "ba_lora_diversity"

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def prepare(self, batch: Batch) -> Mapping[str, Tensor]:
        """Nothing is needed."""
        return {}

    def __call__(self, logits: Tensor, labels: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        """See `LossTerm`."""
        log_q = logits.float().log_softmax(-1)
        return _over_labels((log_q.exp() * log_q).sum(-1), labels)


class SingularValues:
    """Minus the share of the largest singular values in their sum, of the logits of each group of tokens with a label.

    A group counts as many times as it has such tokens, so that over any micro-batches and ranks the loss is a mean
    over tokens. Of a group with no more tokens than `num_largest` the share is 1, and nothing learns from it.

    Args:
        weight: lambda 3.
        num_largest: k.
        group_tokens: Neighbouring positions of a group; divides the tokens of a row.
    """

    name = "ba_lora_singular_values"

    def __init__(self, weight: float, num_largest: int, group_tokens: int) -> None:
        self.weight, self.num_largest, self.group_tokens = weight, num_largest, group_tokens

    def prepare(self, batch: Batch) -> Mapping[str, Tensor]:
        """Nothing is needed.

        Raises:
            ConfigError: A row is no whole number of groups.
        """
        check_whole_groups("ba_lora.group_tokens", self.group_tokens, batch)
        return {}

    def __call__(self, logits: Tensor, labels: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        """See `GroupLossTerm`."""
        valid = (labels != -100).unflatten(0, (-1, self.group_tokens))
        rows = logits.unflatten(0, (-1, self.group_tokens)).float().masked_fill(~valid.unsqueeze(-1), 0.0)
        values = singular_values(rows)
        total = values.sum(-1)
        share = values[..., : self.num_largest].sum(-1) / torch.where(total > 0, total, 1.0)
        return -(share * valid.sum(-1)).sum()


def singular_values(matrix: Tensor) -> Tensor:
    """Return the singular values [..., n] of wide matrices [..., n, m], largest first, with their gradient.

    They are the lengths of U^T Z, with U the eigenvectors of Z Z^T taken as constants: to first order a singular value
    does not depend on how its vectors turn, so this gradient u v^T is exact, and there is none of the differences of
    eigenvalues that a decomposition divides by. m may be a vocabulary: nothing of its square exists.
    """
    with torch.no_grad(), torch.autocast(matrix.device.type, enabled=False):
        _, vectors = torch.linalg.eigh((matrix @ matrix.mT).double())
    with torch.autocast(matrix.device.type, enabled=False):
        return (vectors.flip(-1).to(matrix.dtype).mT @ matrix).norm(dim=-1)


def _over_labels(per_token: Tensor, labels: Tensor) -> Tensor:
    return torch.where(labels != -100, per_token, 0.0).sum()
