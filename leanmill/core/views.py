"""Rule views: the piece of a weight, its gradient and its optimizer state that lies on this rank, live.

A step rule asks `StepContext.views` for them; each engine hands out its own kind. Nothing is ever gathered:
what a rule must know of the whole it counts or sums piece by piece and reduces (`View.reduce`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class Box:
    """The elements of a tensor between `offsets` and `offsets + sizes`, one number a dim."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def index(self, device: torch.device) -> Tensor:
        """Return where each element lies in the flattened whole, int64 of shape `sizes`."""
        import torch

        index = torch.zeros(self.sizes, dtype=torch.int64, device=device)
        stride = 1
        for dim in reversed(range(len(self.shape))):
            place = (torch.arange(self.sizes[dim], device=device) + self.offsets[dim]) * stride
            index += place.view(-1, *[1] * (len(self.shape) - dim - 1))
            stride *= self.shape[dim]
        return index


@dataclass(frozen=True)
class Span:
    """The elements [start, stop) of a flattened tensor."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    stop: int

    def index(self, device: torch.device) -> Tensor:
        """Return where each element lies in the flattened whole, int64 of shape (stop - start,)."""
        import torch

        return torch.arange(self.start, self.stop, device=device)


class View(ABC):
    """One parameter, as far as this rank holds it.

    A piece may have no elements, and which piece a rank holds differs from engine to engine, so a rule
    computes element by element and lets `reduce` do the rest. Every rank asks for the same views and
    reduces in the same order, whether or not its piece is empty.
    """

    name: str
    """Dotted name of the parameter in the model."""
    piece: Box | Span
    """Which elements of the whole these are."""

    @property
    @abstractmethod
    def value(self) -> Tensor:
        """What the optimizer writes: the fp32 master where there is one. Live; see `Views.publish`."""

    @property
    @abstractmethod
    def grad(self) -> Tensor | None:
        """The gradient, shaped like `value`; live, so what is written to it is what is clipped and applied.

        It is there from `before_optimizer` to the optimizer step: summed over micro-batches and ranks and
        divided by the targets of the whole batch, not clipped yet. None elsewhere, and where nothing reached
        the parameter.
        """

    @abstractmethod
    def states(self) -> dict[str, Tensor]:
        """Return the element-wise optimizer state by key, shaped like `value`; live. Empty before the first step."""

    @abstractmethod
    def reduce(self, tensor: Tensor, op: Literal["sum", "max", "min"]) -> Tensor:
        """Return `tensor` reduced over the ranks that hold the other pieces, equal on all. A collective."""

    @abstractmethod
    def beside(self, parameter: nn.Parameter) -> View:
        """View those elements of another, frozen parameter of the same shape (a mask) that lie where these lie.

        Raises:
            ValueError: The shapes differ.
        """

    def index(self) -> Tensor:
        """Return where each element lies in the flattened whole, int64 shaped like `value`."""
        return self.piece.index(self.value.device)

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        count = 1
        for size in self.piece.shape:
            count *= size
        return count


class Views(ABC):
    """The views of all parameters of a model under one engine. Parameters are asked for as they are now.

    Hooks ask anew in every step: sharding and optimizers replace parameters.
    """

    @abstractmethod
    def of(self, parameter: nn.Parameter) -> View:
        """Return the view of a live parameter of the model."""

    @abstractmethod
    def named(self, name: str) -> View:
        """Return the view of a parameter by its dotted name.

        Raises:
            KeyError: The model has none of this name.
        """

    @abstractmethod
    def publish(self, views: Iterable[View]) -> None:
        """Bring what was written to the `value` of `views` to wherever the next forward reads. A collective.

        Needed after writes in `after_optimizer`; what is written before it to a trained parameter the
        optimizer step publishes itself, unless it is skipped.
        """


def whole_of(view: View, piece: Tensor | None) -> Tensor:
    """Return a tensor of which each rank has such a piece, in the dtype of the view's value or fp32. A collective.

    Args:
        view: Of a parameter of the tensor's shape.
        piece: `view.value`, `view.grad` or another tensor like them; for None this rank adds nothing.
    """
    import torch

    dtype = view.value.dtype if view.value.is_floating_point() else torch.float32
    flat = view.value.new_zeros(view.numel, dtype=dtype)
    if piece is not None:
        flat[view.index().flatten()] = piece.flatten().to(flat.dtype)
    return view.reduce(flat, "sum").view(view.piece.shape)


def part_of(view: View, whole: Tensor) -> Tensor:
    """Return those elements of a whole tensor that lie where the view's do."""
    return whole.flatten().to(view.value.device)[view.index()].view(view.value.shape)


def check_same_shape(view: View, shape: Iterable[int]) -> None:
    """Refuse a parameter that cannot lie beside a view.

    Raises:
        ValueError: See above.
    """
    if tuple(shape) != tuple(view.piece.shape):
        raise ValueError(f"{view.name} has shape {tuple(view.piece.shape)}, the tensor beside it {tuple(shape)}")
