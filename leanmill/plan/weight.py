"""What a plan counts: the parameters of a model, and the bytes of a rank by part."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal


@dataclass(frozen=True)
class Weight:
    """One parameter of the model, tied ones once."""

    shape: tuple[int, ...]
    itemsize: int
    trainable: bool
    block: int | None
    """Index of the decoder block it lies in; None outside."""
    staged: bool = False
    """Whether a staged weight is computed from it."""
    once_whole: bool = False
    """Whether that may be done once a step where a rank has all of it."""
    once_in_parts: bool = False
    """Whether that may be done once a step on shards."""
    is_table: bool = False
    """Whether rows are looked up in it."""
    is_expert: bool = False
    """Whether it has an entry for each expert of a layer."""
    num_written: int = 0
    """Tensors like it, fp32, that rules write in the optimizer's state beside its moments."""
    is_saved: bool = True
    """Whether checkpoints hold it."""
    is_mask: bool = False
    """Whether it is a mask, which engines gather as it is."""
    decoded: int = 0
    """Bytes of what a use of it decodes, where it is frozen and kept in fewer bytes."""
    watched: int = 0
    """Bytes that a rank holds in some steps to look at the gradient of a weight that this one changes, all of it."""
    sharers: int | None = None
    """Ranks that share what is counted of it, where those are not the ones that share other weights."""

    split_dim: int | None = None
    """The dim along which ranks that share matmuls have parts of it; None where each has all."""

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def part(self) -> str:
        """Of what kind it is held."""
        return "weights" if self.trainable else "masks" if self.is_mask else "frozen weights"

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole parameter."""
        return self.numel * self.itemsize

    def on_rank(self, ep: int, sharers: int) -> Weight:
        """Return what a rank has of it, where `ep` ranks have experts of their own and `sharers` the same ones.

        Where ranks have unequal numbers of experts, that of those with the most.
        """
        if ep == 1 or not self.is_expert:
            return self
        return replace(self, shape=(-(-self.shape[0] // ep), *self.shape[1:]), sharers=sharers)

    def split_along(self, dim: int | None) -> Weight:
        """Return it as one that ranks which share matmuls have parts of along `dim`."""
        return replace(self, split_dim=dim)

    def shared_by(self, tp: int) -> Weight:
        """Return what a rank has of it, where `tp` ranks share matmuls; they stage their parts at every use."""
        if tp == 1 or self.split_dim is None:
            return self
        dim = self.split_dim
        shape = (*self.shape[:dim], self.shape[dim] // tp, *self.shape[dim + 1 :])
        return replace(self, shape=shape, once_whole=False, once_in_parts=False)


@dataclass
class Memory:
    """Bytes of one rank by part, on its device and (offloaded) on its host."""

    held: dict[str, int] = field(default_factory=dict)
    transient: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    """Held in host memory, or on NVMe, by offload."""

    @property
    def peak(self) -> int:
        """Everything on the device at once."""
        return sum(self.held.values()) + sum(self.transient.values())

    def copy(self) -> Memory:
        """Return one that can be added to without this one changing."""
        return Memory(dict(self.held), dict(self.transient), dict(self.host))

    def add(self, kind: Literal["held", "transient", "host"], part: str, num_bytes: float) -> None:
        """Add to a part; parts of no bytes are left out."""
        if num_bytes > 0:
            parts: dict[str, int] = getattr(self, kind)
            parts[part] = parts.get(part, 0) + round(num_bytes)
