"""Which blocks share, and the tensors of what they share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from leanmill.core.errors import ConfigError, RunError
from leanmill.core.llama_like import completed, own_config
from leanmill.core.surgery import StoredBlock, Surgeon
from leanmill.sparse.structured.widths import OWN_FAMILY, widths_of


_FAMILY = "folded_llama"
"""Of Leanmill's own, whose neighbouring layers share weights; see `leanmill.models.folded_llama`."""
_OF_A_LAYER = ("input_layernorm.weight", "post_attention_layernorm.weight")
"""What each layer of a group keeps for itself."""


class Sharing(Surgeon):
    """Folds neighbouring blocks into one; see `ShareBlocks` for the arguments.

    Args:
        group_size: See there.
        takes_mean: Whether a group's weights begin as the mean of its blocks'.
        adapter_rank: Of what each layer adds to them; 0 is nothing.
        first_layer: See there.
        last_layers: See there.
    """

    def __init__(
        self, *, group_size: int | list[int], takes_mean: bool, adapter_rank: int, first_layer: int, last_layers: int
    ) -> None:
        self.group_size, self.takes_mean, self.adapter_rank = group_size, takes_mean, adapter_rank
        self.first_layer, self.last_layers = first_layer, last_layers
        self.after: Any = None
        self.members: list[list[int]] = []
        """Blocks of the old model in each group."""
        self._group: list[StoredBlock] = []
        """What was met of the group that is being read."""

    def config(self, before: Any) -> Any:
        if before.model_type == OWN_FAMILY:
            raise ConfigError(
                f"share_blocks: layers of a {OWN_FAMILY} have sizes of their own, so none can take another's weights; "
                f"share first, or give a model whose layers are alike"
            )
        sizes, _ = widths_of("share_blocks", before)
        numbers = self._numbers(sizes.layers)
        starts = [sum(numbers[:group]) for group in range(len(numbers))]
        self.members = [list(range(start, start + number)) for start, number in zip(starts, numbers, strict=True)]
        self.after = own_config(
            "share_blocks",
            _FAMILY,
            before,
            head_dim=sizes.head_dim,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.groups,
            intermediate_size=sizes.neurons,
            num_layers_by_block=numbers,
            adapter_rank=self.adapter_rank,
        )
        return self.after

    def _numbers(self, num_layers: int) -> list[int]:
        """How many blocks each group has."""
        if isinstance(self.group_size, list):
            if sum(self.group_size) != num_layers:
                raise ConfigError(
                    f"share_blocks: group_size={self.group_size} speaks of {sum(self.group_size)} blocks, and the "
                    f"model has {num_layers}; let the sizes add up to {num_layers}"
                )
            return self.group_size
        shared = num_layers - self.first_layer - self.last_layers
        if shared < 2:
            raise ConfigError(
                f"share_blocks: of {num_layers} blocks first_layer={self.first_layer} and last_layers="
                f"{self.last_layers} leave {max(0, shared)} that may share; leave at least 2"
            )
        full, rest = divmod(shared, self.group_size)
        return [1] * self.first_layer + [self.group_size] * full + [rest] * (rest > 0) + [1] * self.last_layers

    def place(self, index: int) -> int:
        return next(group for group, members in enumerate(self.members) if index in members)

    def block(self, block: StoredBlock) -> Iterator[tuple[str, Tensor]]:
        return completed(self.after, self.after.hidden_size, self._tensors(block))

    def _tensors(self, block: StoredBlock) -> Iterator[tuple[str, Tensor]]:
        members = self.members[self.place(block.index)]
        for name in _OF_A_LAYER:
            yield f"{name.removesuffix('weight')}{members.index(block.index)}.weight", _finite(block, name)
        self._group = [*(self._group if block.index > members[0] else []), block]
        if block.index < members[-1]:
            return  # read again, one name of all layers at a time
        has_own = self.adapter_rank > 0 and len(members) > 1
        for name in sorted(block.names - set(_OF_A_LAYER)):
            theirs = [_finite(one, name) for one in self._group]
            shared = _mean(theirs) if self.takes_mean else theirs[0]
            if not has_own:
                yield name, shared
            elif name.endswith("_norm.weight"):  # of queries and keys
                yield from ((f"own.{use}.{name.split('.')[1]}.weight", one) for use, one in enumerate(theirs))
            else:
                yield name, shared
                yield from self._adapters(name, shared, theirs)
        if has_own and self.after.attention_bias and "self_attn.o_proj.bias" not in block.names:
            zeros = torch.zeros(self.after.hidden_size, dtype=block.read(_OF_A_LAYER[0]).dtype)
            yield from ((f"own.{use}.o_proj.bias", zeros.clone()) for use in range(len(members)))

    def _adapters(self, name: str, shared: Tensor, theirs: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """What each layer lacks of its weight or bias where it has the shared one, as it is stored, in its place."""
        _, projection, kind = name.split(".")
        for use, one in enumerate(theirs):
            lacking, place = one.float() - shared.float(), f"own.{use}.{projection}"
            if kind == "bias":
                yield f"{place}.bias", lacking.to(one.dtype)
                continue
            left, values, right = torch.linalg.svd(lacking, full_matrices=False)
            rank = min(self.adapter_rank, len(values))
            yield f"{place}.up", (left[:, :rank] * values[:rank]).to(one.dtype)
            yield f"{place}.down", right[:rank].to(one.dtype).contiguous()

    def describe(self) -> str:
        shared = [f"{group[0]} to {group[-1]}" for group in self.members if len(group) > 1]
        start = "as their mean" if self.takes_mean else "as the first of them"
        own = f", each layer with adapters of rank {self.adapter_rank}" if self.adapter_rank else ""
        return f"{len(self.members)} blocks; of the old ones share {', '.join(shared)}, {start}{own}"


def _mean(tensors: list[Tensor]) -> Tensor:
    total = torch.zeros_like(tensors[0], dtype=torch.float32)
    for tensor in tensors:
        total += tensor
    return (total / len(tensors)).to(tensors[0].dtype)


def _finite(block: StoredBlock, name: str) -> Tensor:
    """Read a tensor that several layers are about to have.

    Raises:
        RunError: Some of it is no number.
    """
    tensor = block.read(name)
    if not torch.isfinite(tensor).all():
        raise RunError(
            f"share_blocks: {name} of block {block.index} holds what is not finite; give a checkpoint from before the "
            f"run diverged"
        )
    return tensor
