"""The mask of whole heads and neurons, as a stage."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from leanmill.core.sites import Sites
from leanmill.core.stage import Slot, Stage
from leanmill.sparse.structured.anatomy import axes_of
from leanmill.sparse.structured.widths import Widths


Part = Literal["heads", "neurons"]
_IN_BLOCK = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.*)")
_OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")
"""Whose stage holds the importance of what enters it."""


class StructureMask(Stage):
    """Zeros the rows or columns of a weight [out, in] that belong to structures that are masked.

    Args:
        layer: Index of the block.
        part: What structures are: key-value heads with their query heads, or neurons.
        count: How many there are.
        width: Neighbouring rows or columns of one.
        dim: 0 for rows, 1 for columns.
        holds_importance: Whether the importance of the structures is kept here.
        device: Where they live.
    """

    slot: ClassVar[Slot] = Slot.MASK
    technique: ClassVar[str] = "lora_prune"
    kept: nn.Parameter
    """[count] bool, frozen."""
    importance: nn.Parameter | None
    """[count] fp32, frozen: the running mean."""

    def __init__(
        self,
        *,
        layer: int,
        part: Part,
        count: int,
        width: int,
        dim: int,
        holds_importance: bool,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.part, self.count, self.width, self.masked_dim = layer, part, count, width, dim
        self.kept = nn.Parameter(torch.empty(count, dtype=torch.bool, device=device), requires_grad=False)
        importance = torch.empty(count, dtype=torch.float32, device=device)
        self.importance = nn.Parameter(importance, requires_grad=False) if holds_importance else None

    def forward(self, weight: Tensor) -> Tensor:
        mask = self.kept.repeat_interleave(self.width)
        return torch.where(mask[:, None] if self.masked_dim == 0 else mask, weight, 0)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.kept.fill_(True)
        if self.importance is not None:
            self.importance.zero_()

    def numbers(self, shape: Sequence[int], index: Tensor) -> Tensor:
        """Return the structure of each element, int64 like `index`, the places in the flattened weight."""
        places = index // shape[1] if self.masked_dim == 0 else index % shape[1]
        return places // self.width


def put_masks(sites: Sites, layers: range, parts: Sequence[str], widths: Widths, head_dim: int) -> None:
    """Put a mask on every weight of these layers that belongs to heads or neurons."""
    for site in sites.select(None, []):
        found = _IN_BLOCK.fullmatch(site.site_name)
        if found is None or int(found[1]) not in layers:
            continue
        layer, axes = int(found[1]), axes_of(f"{found[2]}.weight")
        for dim, axis in enumerate(axes):
            part: Part | None = {"heads": "heads", "groups": "heads", "neurons": "neurons"}.get(axis or "")  # type: ignore[assignment]
            if part is None or part not in parts:
                continue
            count = widths.groups[layer] if part == "heads" else widths.neurons[layer]
            weight = site.raw_weight
            site.put(
                StructureMask(
                    layer=layer,
                    part=part,
                    count=count,
                    width=weight.shape[dim] // count,
                    dim=dim,
                    holds_importance=found[2] in _OUTPUTS,
                    device=weight.device,
                )
            )
