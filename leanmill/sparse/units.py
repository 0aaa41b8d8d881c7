"""What masks keep or prune as one, and choosing the best of it over all ranks. Imports torch lazily.

A pattern is a unit (a weight, a block, a row, a column) and a scope (a layer, all layers together). Ranks hold pieces
of a weight that may be cut inside a unit; nothing is gathered: weights are chosen by counts, and other units by their
scores, summed over the ranks, of which there are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.technique import WeightTechniqueConfig


if TYPE_CHECKING:
    from torch import Tensor

    from leanmill.core.views import View


Scope = Literal["layer", "global"]


@dataclass(frozen=True)
class Unit:
    """What is kept or pruned as one, of weights [..., out, in]."""

    kind: Literal["weight", "block", "row", "column"]
    block_shape: tuple[int, int] = (1, 1)
    """Rows and columns of a block."""

    def check(self, name: str, shape: Sequence[int], technique: str) -> None:
        """Refuse a weight that blocks do not divide.

        Raises:
            ConfigError: See above.
        """
        rows, columns = self._sizes(shape)
        if shape[-2] % rows or shape[-1] % columns:
            raise ConfigError(
                f"{name}: blocks of {rows} x {columns} do not divide its weight {list(shape)}; add {name!r} to "
                f"{technique}.exclude, or choose a block_shape that divides {shape[-2]} and {shape[-1]}"
            )

    def count(self, shape: Sequence[int]) -> int:
        """Return how many units a weight has."""
        rows, columns = self._sizes(shape)
        total = 1
        for size in shape:
            total *= size
        return total // (rows * columns)

    def numbers(self, shape: Sequence[int], index: Tensor) -> Tensor:
        """Return the number of the unit of each element, int64 like `index`, the places in the flattened weight."""
        rows, columns = self._sizes(shape)
        row, column = index // shape[-1], index % shape[-1]
        return row // rows * (shape[-1] // columns) + column // columns

    def _sizes(self, shape: Sequence[int]) -> tuple[int, int]:
        whole = {"weight": (1, 1), "row": (1, shape[-1]), "column": (shape[-2], 1)}
        return whole.get(self.kind, self.block_shape)


_Side = Annotated[int, Field(ge=1)]


class UnitsConfig(WeightTechniqueConfig):
    """Base of techniques that prune units of weights."""

    pattern: Literal["unstructured", "block", "row", "column"] = "unstructured"
    """What is pruned as one: weights, blocks of `block_shape`, rows (outputs) or columns (inputs)."""
    block_shape: tuple[_Side, _Side] | None = None
    """Rows and columns of a block; they must divide every target."""
    scope: Scope = "layer"
    """`layer` prunes the same share of each weight, `global` compares all of them; a stack of experts is one."""

    @model_validator(mode="after")
    def _has_a_shape_or_none(self) -> UnitsConfig:
        if (self.pattern == "block") != (self.block_shape is not None):
            raise ConfigError(
                f"{self._type} with pattern {self.pattern} and block_shape {self.block_shape}; set pattern: block "
                f"and block_shape: [4, 4] together, or neither"
            )
        return self

    @property
    def _type(self) -> str:
        return str(type(self).model_fields["type"].default)

    def unit(self) -> Unit:
        """Return what is pruned as one."""
        if self.pattern == "unstructured":
            return Unit("weight")
        return Unit(self.pattern, self.block_shape or (1, 1))

    def check_target(self, name: str, shape: tuple[int, ...], sparsity: float) -> None:
        """Refuse a weight that blocks do not divide, or of which nothing would be left.

        Raises:
            ConfigError: See above.
        """
        unit = self.unit()
        unit.check(name, shape, self._type)
        if self.scope == "layer" and round(sparsity * unit.count(shape)) == unit.count(shape):
            raise ConfigError(
                f"{self._type}.sparsity={sparsity:g} leaves none of {unit.count(shape)} {unit.kind}s of "
                f"{name} {list(shape)}; lower it, or add {name!r} to {self._type}.exclude"
            )


@dataclass(frozen=True)
class Scored:
    """A weight that is to be pruned further, as far as this rank holds it."""

    weight: View
    mask: View
    """What is on now."""
    score: Tensor
    """fp32 like the weight's value; NaN counts as larger than any number."""


def choose(
    layers: Sequence[Scored], unit: Unit, sparsity: float, scope: Scope, *, is_signed: bool = False
) -> list[Tensor]:
    """Return new masks that leave `sparsity` of the units off, of those that are on the ones with the lowest score.

    Units of several weights are compared by the mean of their scores, which are not negative unless `is_signed`. What
    is off stays off. A collective, which waits for the device.
    """
    if scope == "global":
        return _keep(layers, unit, sparsity, is_signed)
    return [mask for layer in layers for mask in _keep([layer], unit, sparsity, is_signed)]


def _keep(layers: Sequence[Scored], unit: Unit, sparsity: float, is_signed: bool) -> list[Tensor]:
    from leanmill.core.selection import largest_of_all

    if not layers:
        return []
    total = sum(unit.count(layer.weight.piece.shape) for layer in layers)
    wanted = total - round(sparsity * total)
    if unit.kind == "weight":
        views, among = [layer.weight for layer in layers], [layer.mask.value for layer in layers]
        available = sum(int(view.reduce(mask.sum(), "sum")) for view, mask in zip(views, among, strict=True))
        scores = [layer.score for layer in layers]
        return largest_of_all(scores, min(wanted, available), among=among, views=views, is_signed=is_signed)
    numbers = [unit.numbers(layer.weight.piece.shape, layer.weight.index()) for layer in layers]
    sums = [_summed(layer, unit, number, layer.score) for layer, number in zip(layers, numbers, strict=True)]
    is_on = [_summed(layer, unit, number, layer.mask.value) > 0 for layer, number in zip(layers, numbers, strict=True)]
    means = [
        (total_of.nan_to_num(nan=float("inf"), posinf=float("inf")) * unit.count(shape) / layer.weight.numel).float()
        for layer, total_of in zip(layers, sums, strict=True)
        for shape in [layer.weight.piece.shape]
    ]
    count = min(wanted, sum(int(on.sum()) for on in is_on))
    marked = largest_of_all(means, count, among=is_on, is_signed=is_signed)
    return [mark[number] for mark, number in zip(marked, numbers, strict=True)]


def _summed(layer: Scored, unit: Unit, numbers: Tensor, values: Tensor) -> Tensor:
    """Sum `values` by unit over all ranks, fp64 [units], so that the order of additions hardly shows."""
    import torch

    shape = layer.weight.piece.shape
    sums = torch.zeros(unit.count(shape), dtype=torch.float64, device=values.device)
    return layer.weight.reduce(sums.index_add_(0, numbers.flatten(), values.flatten().double()), "sum")
