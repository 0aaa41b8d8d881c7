"""Operations on DTensors that hold whole rows: each rank works on its own, and sums over rows meet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor


if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement


def is_dtensor(tensor: Tensor | None) -> bool:
    """Whether `tensor` is sharded, without importing torch.distributed for the answer."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def on_local_rows(function: Callable[[Tensor], Tensor], tensor: Tensor, *, num_row_dims: int = 1) -> Tensor:
    """Apply a function that treats rows independently and keeps the shape, differentiably.

    Args:
        function: Works on the last `num_row_dims` dims of whatever leading dims there are.
        tensor: A DTensor [..., rows], or a plain tensor, which is passed on as it is.
        num_row_dims: Trailing dims that must be whole on every rank.

    Raises:
        ValueError: A trailing dim is sharded, or the tensor is a pending sum.
    """
    if not is_dtensor(tensor):
        return function(tensor)
    _check_rows("a weight", tensor, num_row_dims)
    return _spread(function(_local(tensor)), tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride())  # type: ignore[attr-defined]


@dataclass(frozen=True)
class TokenLayout:
    """Which tokens each rank holds: the placement that all tensors with one entry a token share.

    A result with an entry a token is placed like the tokens. Sums over tokens are those of all
    ranks, and so are the gradients of what every token meets, such as a head's weight.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    """Replicate, or Shard of a dim of tokens."""
    leading: torch.Size
    """The dims of all tokens."""

    @classmethod
    def of(cls, name: str, tokens: Tensor, *, num_row_dims: int = 1) -> TokenLayout:
        """Return the layout of a DTensor.

        Args:
            name: What messages call it.
            tokens: [tokens..., row].
            num_row_dims: Trailing dims that make up a token's row.

        Raises:
            ValueError: A rank does not hold whole rows.
        """
        _check_rows(name, tokens, num_row_dims)
        leading = tokens.shape[: tokens.dim() - num_row_dims]
        return cls(tokens.device_mesh, tuple(tokens.placements), leading)  # type: ignore[attr-defined]

    def local(self, name: str, tensor: Tensor) -> Tensor:
        """Return this rank's part of a DTensor [tokens..., *]; its gradient is placed as the tensor is.

        Raises:
            ValueError: Plain, or placed otherwise.
        """
        if not is_dtensor(tensor):
            raise ValueError(
                f"{name} {tuple(tensor.shape)} is plain and other tensors are DTensors over {self.placements}; call "
                f"distribute_tensor({name}, mesh, placements), or DTensor.from_local on this rank's part"
            )
        mesh, placements = _where(tensor)
        if mesh != self.mesh or placements != self.placements:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} is placed {placements} on {mesh} and other tensors {self.placements} "
                f"on {self.mesh}; on one mesh call {name}.redistribute(placements={list(self.placements)})"
            )
        return _local(tensor)

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """Return this rank's copy of a tensor that every token meets; its gradient is a pending sum over ranks.

        Args:
            name: What messages call it.
            tensor: A DTensor that is Replicate everywhere, or plain and equal on all ranks. Ranks see
                parts of a plain one's gradient, which nothing would add up, so it must need none.

        Raises:
            ValueError: Sharded, over another mesh, or plain and in need of a gradient.
        """
        if not is_dtensor(tensor):
            if tensor.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"{name} {tuple(tensor.shape)} is plain and needs a gradient, of which each rank would see the "
                    f"part of its own tokens; call distribute_tensor({name}, mesh, [Replicate()] * mesh.ndim)"
                )
            return tensor
        from torch.distributed.tensor import Partial, Replicate

        mesh, placements = _where(tensor)
        if mesh != self.mesh or any(not p.is_replicate() for p in placements):
            raise ValueError(
                f"{name} {tuple(tensor.shape)} is placed {placements} on {mesh}; every rank needs all of it, on "
                f"the tokens' {self.mesh}: call {name}.redistribute(placements=[Replicate()] * mesh.ndim)"
            )
        return _local(tensor, [Replicate() if p.is_replicate() else Partial() for p in self.placements])

    def positions(self) -> Tensor:
        """Return where this rank's entries stand along the first dim of all tokens, int64 [local]."""
        from torch.distributed.tensor import distribute_tensor

        everywhere = torch.arange(self.leading[0], device=self.mesh.device_type)
        # No source rank: all make the same numbers, so nothing has to be sent.
        return distribute_tensor(everywhere, self.mesh, self.placements, src_data_rank=None).to_local()

    def spread(self, local: Tensor) -> Tensor:
        """Return the DTensor [tokens..., *] of what each rank made of its tokens, differentiable."""
        shape = torch.Size((*self.leading, *local.shape[len(self.leading) :]))
        stride = torch.empty(shape, device="meta").stride()
        return _spread(local.contiguous(), self.mesh, self.placements, shape, stride)

    def total(self, local: Tensor) -> Tensor:
        """Return the sum over the ranks' tokens as a Replicate DTensor, differentiable.

        Tokens that several ranks hold count once.
        """
        from torch.distributed.tensor import DTensor, Partial, Replicate

        pending = [Replicate() if p.is_replicate() else Partial() for p in self.placements]
        summed = DTensor.from_local(local, self.mesh, pending, run_check=False)
        return summed.redistribute(placements=[Replicate()] * self.mesh.ndim)


def mean_over_kept(total: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Return `total` / the number of labels, of all ranks for a DTensor, that are not `ignore_index`.

    Over no labels that is NaN, whose gradient is 0 as that of torch's cross_entropy: nothing depends
    on what was ignored.
    """
    kept = _num_kept(labels, ignore_index)
    # The quotient carries the gradient, and 0 / 0 the NaN.
    return total / kept.clamp(min=1) + 0.0 / kept


def _num_kept(labels: Tensor, ignore_index: int) -> Tensor:
    if not is_dtensor(labels):
        return (labels != ignore_index).sum()
    layout = TokenLayout.of("labels", labels, num_row_dims=0)
    return layout.total((_local(labels) != ignore_index).sum())


def _check_rows(name: str, tensor: Tensor, num_row_dims: int) -> None:
    whole_from = tensor.dim() - num_row_dims
    placements = _where(tensor)[1]
    for placement in placements:
        dim = getattr(placement, "dim", None)
        if placement.is_replicate() or (dim is not None and dim % tensor.dim() < whole_from):
            continue
        raise ValueError(
            f"{name} {tuple(tensor.shape)} placed {placements} does not hold whole rows (last {num_row_dims} dims); "
            f"allowed: Replicate and Shard(d) for d < {whole_from}; "
            f"call redistribute(placements=[Replicate()] * mesh.ndim) on it first"
        )


def _where(tensor: Any) -> tuple[DeviceMesh, tuple[Placement, ...]]:
    return tensor.device_mesh, tuple(tensor.placements)


def _local(tensor: Any, grad_placements: list[Placement] | None = None) -> Tensor:
    return tensor.to_local(grad_placements=grad_placements)


def _spread(local: Tensor, mesh: Any, placements: Any, shape: torch.Size, stride: tuple[int, ...]) -> DTensor:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
