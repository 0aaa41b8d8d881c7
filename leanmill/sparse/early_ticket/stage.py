"""The mask of an early ticket, as a stage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import nn

from leanmill.sparse.held import HeldMask


class TicketMask(HeldMask):
    """Keeps everything until the ticket is drawn."""

    technique: ClassVar[str] = "early_ticket"
    history: nn.Parameter
    """[..., out, in] uint8, frozen: bit i is the mask that was found i + 1 times ago."""

    def __init__(self, shape: Iterable[int], *, device: torch.device | None = None) -> None:
        super().__init__(shape, device=device)
        self.history = nn.Parameter(torch.empty_like(self.mask, dtype=torch.uint8), requires_grad=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.history.zero_()
