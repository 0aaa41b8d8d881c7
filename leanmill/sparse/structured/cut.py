"""Cutting a model down to the channels, heads, neurons and layers that are kept."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leanmill.core.errors import ConfigError
from leanmill.core.surgery import StoredBlock
from leanmill.sparse.structured.anatomy import Axis, Sizes, axes_of


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Indices of what stays, ascending, int64; None keeps all."""

    layers: list[int]
    hidden: Tensor | None = None
    heads: Sequence[Tensor] | None = None
    """Query heads of each layer of the old model, as many from each key-value head that stays."""
    groups: Sequence[Tensor] | None = None
    """Key-value heads of each layer of the old model."""
    neurons: Sequence[Tensor] | None = None
    """Of each layer of the old model."""


class Cutter:
    """Takes what is kept out of the tensors of a model.

    Args:
        sizes: Of the model there is.
        kept: What stays.
        norm_scale: What the weights of norms over the residual stream are multiplied by.
    """

    def __init__(self, sizes: Sizes, kept: Kept, *, norm_scale: float = 1.0) -> None:
        self.sizes, self.kept, self.norm_scale = sizes, kept, norm_scale
        self._places = {layer: place for place, layer in enumerate(kept.layers)}

    def place(self, index: int) -> int | None:
        """See `Surgeon.place`."""
        return self._places.get(index)

    def block(self, block: StoredBlock) -> Iterator[tuple[str, Tensor]]:
        """See `Surgeon.block`."""
        for name in sorted(block.names):
            yield name, self._cut(name, block.read(name), block.index)

    def outside(self, name: str, tensor: Tensor) -> Tensor:
        """See `Surgeon.outside`."""
        return self._cut(name, tensor, 0)

    def _cut(self, name: str, tensor: Tensor, layer: int) -> Tensor:
        axes = axes_of(name)
        for dim, axis in enumerate(axes):
            index = None if axis is None else self._index(axis, layer)
            if index is not None:
                tensor = tensor.index_select(dim, index)
        if axes == ("hidden",) and "norm" in name and self.norm_scale != 1:
            tensor = (tensor.float() * self.norm_scale).to(tensor.dtype)
        return tensor.contiguous()

    def _index(self, axis: Axis, layer: int) -> Tensor | None:
        if axis == "hidden":
            return self.kept.hidden
        chosen = {"heads": self.kept.heads, "groups": self.kept.groups, "neurons": self.kept.neurons}[axis]
        if chosen is None:
            return None
        return chosen[layer] if axis == "neurons" else rows_of_heads(chosen[layer], self.sizes.head_dim)


def rows_of_heads(heads: Tensor, head_dim: int) -> Tensor:
    """Return the rows of a projection that belong to heads [n], int64 [n x head_dim]."""
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


def smaller_config(technique: str, before: Any, sizes: Sizes, layers: Sequence[int]) -> Any:
    """Return the transformers configuration of a model of other sizes.

    Args:
        technique: Who asks.
        before: Of the model there is; not changed.
        sizes: Of the model to be.
        layers: Which layers of the old one stay.

    Raises:
        ConfigError: transformers refuses these sizes together.
    """
    after = copy.deepcopy(before)
    after.hidden_size, after.intermediate_size = sizes.hidden, sizes.neurons
    after.num_attention_heads, after.num_key_value_heads = sizes.heads, sizes.groups
    after.head_dim = sizes.head_dim
    after.num_hidden_layers = len(layers)
    if getattr(before, "layer_types", None):
        after.layer_types = [before.layer_types[layer] for layer in layers]
    try:
        type(after).from_dict(after.to_dict())
    except Exception as error:
        raise ConfigError(
            f"{technique}: transformers has no {before.model_type} of these sizes: "
            f"{str(error.__cause__ or error).splitlines()[-1]}; ask for other sizes"
        ) from error
    return after


def highest(scores: Tensor, number: int) -> Tensor:
    """Return the indices of the highest scores [n], ascending; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:number].sort().values


def heads_in_groups(scores: Tensor, old_groups: int, num_heads: int, num_groups: int) -> tuple[Tensor, Tensor]:
    """Return the query heads and the key-value heads that stay, ascending.

    A key-value head counts for the root of the summed squares of its query heads; of each that stays, as many of the
    highest query heads do.

    Args:
        scores: Of query heads, [heads]; neighbours share a key-value head.
        old_groups: Key-value heads there are.
        num_heads: Query heads that stay.
        num_groups: Key-value heads that stay; divides `num_heads`.
    """
    by_group = scores.view(old_groups, -1)
    groups = highest(by_group.square().sum(1), num_groups)
    shared = by_group.shape[1]
    heads = [group * shared + highest(by_group[group], num_heads // num_groups) for group in groups]
    return torch.cat(heads), groups
