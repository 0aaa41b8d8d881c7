"""What the mean affinities P of a balance loss are multiplied with: constants that loads decide.

Each loss is sum_i factor_i P_i, and 1 where loads are equal. Any leading dims: layers, or rows of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def of_experts(counts: Tensor) -> Tensor:
    """Return E f_i: what E sum_i f_i P_i multiplies P_i with (arXiv:2101.03961, eq. 4, divided by K).

    Args:
        counts: Copies sent to each expert [..., E].
    """
    return counts * (counts.shape[-1] / counts.sum(-1, keepdim=True).clamp(min=1))


@dataclass(frozen=True)
class Devices:
    """Groups of experts, neighbours, that lie on one device each, for the losses of DeepSeek-V2 (arXiv:2405.04434).

    They need not be devices of the run.
    """

    number: int
    """D; it divides the number of experts."""
    per_token: int | None
    """M: the most devices that a token is sent to; the communication loss needs it."""

    def of_devices(self, counts: Tensor) -> Tensor:
        """Return f'_d of the device of each expert [..., E], as in sum_d f'_d P'_d (eq. 26 to 28).

        Args:
            counts: Copies sent to each expert [..., E].
        """
        factors = of_experts(counts)
        grouped = factors.unflatten(-1, (self.number, -1))
        return grouped.mean(-1, keepdim=True).expand_as(grouped).reshape(factors.shape)

    def of_communication(self, sent: Tensor, num_tokens: Tensor, num_experts: int) -> Tensor:
        """Return f''_d of the device of each expert [..., E], as in sum_d f''_d P''_d (eq. 29 to 31).

        Args:
            sent: Tokens sent to each device [..., D].
            num_tokens: Of all [..., 1].
            num_experts: E.
        """
        assert self.per_token is not None
        factors = sent * (self.number / (self.per_token * num_tokens.clamp(min=1)))
        return factors.repeat_interleave(num_experts // self.number, -1)

    def reached(self, experts: Tensor, num_experts: int) -> Tensor:
        """Return which devices each token is sent to, bool [T, D], from its experts [T, K]; expert E is none."""
        devices = experts // (num_experts // self.number)
        found = devices.new_zeros(len(experts), self.number + 1, dtype=torch.bool)
        return found.scatter(1, devices, True)[:, :-1]  # noqa: FBT003
