"""What was trained in a subspace of a weight, as a delta."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from leanmill.core.stage import Slot, Stage
from leanmill.kernels.lowrank_delta.op import lowrank_delta
from leanmill.peft_ext.galore.watching import Moved


Source = Literal["svd", "sketch", "random"]
OVERSAMPLE = 8
"""Columns of a sketch beyond the rank (Halko et al. 2011, section 1.3)."""


class GaLoreStage(Stage):
    """W [..., out, in] -> W + P N where out <= in, P [..., out, rank] of orthonormal columns and N [..., rank, in].

    Else W + N P, with N [..., out, rank] and P [..., rank, in] of orthonormal rows. P is frozen, so the gradient of N
    is that of the weight, projected. All in fp32.

    Args:
        weight: The weight it will be given: shape, device and leading (expert) dims are taken.
        rank: Dimensions of the subspace.
        source: Where subspaces come from; decides what is held while one is found.
        history: Last gradients of N that are kept.
    """

    slot: ClassVar[Slot] = Slot.DELTA
    technique: ClassVar[str] = "galore"
    writes_weight: ClassVar[bool] = True
    watcher: Tensor
    """int64 (1,): number of who watches gradients. No buffer, so that it stays on the CPU, where it is read."""

    def __init__(self, weight: Tensor, rank: int, *, source: Source = "svd", history: int = 0) -> None:
        super().__init__()
        *experts, num_out, num_in = weight.shape
        self.rank, self.source, self.is_left = rank, source, num_out <= num_in
        self.shape = torch.Size(weight.shape)
        of_columns, of_rows = (*experts, num_out, rank), (*experts, rank, num_in)
        basis, coordinates = (of_columns, of_rows) if self.is_left else (of_rows, of_columns)
        dtype = torch.promote_types(weight.dtype, torch.float32)

        def empty(shape: tuple[int, ...], trains: bool) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=weight.device), requires_grad=trains)

        self.basis, self.coordinates = empty(basis, False), empty(coordinates, True)
        self.past = nn.ParameterList(empty(coordinates, False) for _ in range(history))
        self.watcher = torch.full((1,), -1, device="cpu")
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        drawn = torch.randn(self.basis.shape) if self.basis.device.type != "meta" else torch.empty_like(self.basis)
        self.basis.copy_(orthonormal(drawn, is_left=self.is_left))
        self.coordinates.zero_()
        for gradient in self.past:
            gradient.zero_()

    def forward(self, weight: Tensor) -> Tensor:
        basis, coordinates = self.basis, self.coordinates
        with torch.no_grad():
            moved = self.delta_added(weight, basis, coordinates)
        return Moved.apply(moved, weight, basis, coordinates, self.watcher, self.is_left)  # type: ignore[no-any-return]

    def delta_added(self, weight: Tensor, basis: Tensor, coordinates: Tensor) -> Tensor:
        """Return the weight with the product of two such tensors added."""
        left, right = (basis, coordinates) if self.is_left else (coordinates, basis)
        return lowrank_delta(weight, right, left, 1.0)

    @property
    def bytes_watched(self) -> int:
        """Bytes that a rank holds beside the weight while a new subspace is found."""
        if self.source == "random":
            return 0
        *experts, num_out, num_in = self.shape
        width = num_out if self.is_left else num_in
        columns = max(num_out, num_in) if self.source == "svd" else min(num_out, num_in, self.rank + OVERSAMPLE)
        return self.basis.element_size() * width * columns * torch.Size(experts).numel()

    def extra_repr(self) -> str:
        return f"rank={self.rank}, source={self.source!r}"


def orthonormal(matrix: Tensor, *, is_left: bool) -> Tensor:
    """Return a basis of the columns of a matrix [..., n, r], or of the rows of one [..., r, n]."""
    if is_left:
        return torch.linalg.qr(matrix)[0]
    return torch.linalg.qr(matrix.mT)[0].mT.contiguous()
