"""Frozen weights in fewer bytes: in bf16, or as codes of 8 or 4 bits with a scale for each block of a row.

A compact weight arrives at the stages after it as its decoded values, so what trains on top of it, is merged into it
and exported is exactly what a plain weight of those values would give. Codes are plain frozen parameters of
bytes: they are sharded, gathered and saved as masks are, under every engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.site import Site
from leanmill.core.stage import Decode, Slot, Stage
from leanmill.kernels.packing.op import pack


Kind = Literal["bf16", "int8", "int4", "nf4"]
BLOCK = 64
"""Neighbours of a row that share a scale in 4 bits, as in QLoRA; with 8 bits a whole row does."""
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""NormalFloat with 4 bits (Dettmers et al. 2023, arXiv:2305.14314, appendix E)."""


class CodedWeight(Stage):
    """Decodes a frozen weight that a site keeps in fewer bytes; the first stage of all.

    Args:
        shape: Of the weight, [..., out, in].
        dtype: Of the decoded weight.
    """

    slot: ClassVar[Slot] = Slot.COMPACT
    scale: nn.Parameter
    """fp32 [..., out, blocks], where the parameter holds codes."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = torch.Size(shape), dtype

    @property
    def has_codes(self) -> bool:
        """Whether the parameter holds integers rather than values."""
        return True

    def empty(self, device: torch.device) -> Tensor:
        """Return a parameter's worth of memory for the weight."""
        raise NotImplementedError

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes and scales of some rows.

        Args:
            weight: [..., in], floating.

        Returns:
            Shaped as the parameter and `scale` are, for these rows.
        """
        raise NotImplementedError

    def assign_encoded(self, kept: Tensor, weight: Tensor, assign: Callable[[Tensor, Tensor], object]) -> None:
        """Have `assign` write codes and scales of a whole weight, into `kept` and `scale`."""
        codes, scales = self.encode(weight)
        assign(kept, codes)
        assign(self.scale, scales)


class Compact(CodedWeight):
    """Decodes a frozen weight that a site keeps as `kind`; the first stage of all.

    - `bf16`: the parameter is [..., out, in] bf16.
    - `int8`: codes -127 .. 127, int8 [..., out, in], one scale a row: its largest magnitude / 127.
    - `int4`: codes -7 .. 7, offset by 8, two in a byte, uint8 [..., out, ceil(in / 2)]; scales of `BLOCK` neighbours.
    - `nf4`: indices of `NF4_LEVELS`, stored alike. Unlike QLoRA's its scales are not quantised in turn, and a
      block never spans two rows, so that any rank can encode and decode its own rows.

    Args:
        shape: Of the weight, [..., out, in].
        kind: How it is kept.
        dtype: Of the decoded weight.
        device: Of the weight.
    """

    technique: ClassVar[str] = "model.frozen_dtype"
    once_a_step: ClassVar[bool] = True
    table: Tensor

    def __init__(self, shape: Sequence[int], kind: Kind, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(shape, dtype)
        self.kind = kind
        if self.has_codes:
            empty = torch.empty(*shape[:-1], self._num_blocks, dtype=torch.float32, device=device)
            self.scale = nn.Parameter(empty, requires_grad=False)
        if kind == "nf4":
            self.register_buffer("table", torch.empty(1, 256, 2, device=device), persistent=False)
            self.reset_parameters()

    @property
    def has_codes(self) -> bool:
        return self.kind != "bf16"

    @property
    def _num_blocks(self) -> int:
        return 1 if self.kind == "int8" else math.ceil(self.shape[-1] / BLOCK)

    def empty(self, device: torch.device) -> Tensor:
        if self.kind in ("bf16", "int8"):
            dtype = torch.bfloat16 if self.kind == "bf16" else torch.int8
            return torch.empty(self.shape, dtype=dtype, device=device)
        return torch.empty(*self.shape[:-1], math.ceil(self.shape[-1] / 2), dtype=torch.uint8, device=device)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.kind == "nf4":
            # Both values of a byte at once: half the look-ups, and indices of half the size.
            levels = torch.tensor(NF4_LEVELS)
            byte = torch.arange(256)
            self.table.copy_(torch.stack([levels[byte & 15], levels[byte >> 4]], -1).unsqueeze(0))

    @torch.no_grad()
    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        *rows, num_in = weight.shape
        blocks = self._blocks(weight.float())
        largest = blocks.abs().amax(-1)
        relative = blocks / largest.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
        if self.kind == "nf4":
            levels = torch.tensor(NF4_LEVELS, device=weight.device)
            codes = torch.bucketize(relative, (levels[1:] + levels[:-1]) / 2)
            return pack(codes.view(*rows, -1)[..., :num_in].to(torch.uint8).contiguous(), 4), largest
        top = 127 if self.kind == "int8" else 7
        codes = (relative * top).round().view(*rows, -1)[..., :num_in]
        if self.kind == "int8":
            return codes.to(torch.int8), largest / top
        return pack((codes + 8).to(torch.uint8).contiguous(), 4), largest / top

    def _blocks(self, weight: Tensor) -> Tensor:
        """[..., blocks, weights of one], the last one filled up with zeros."""
        num_in = weight.shape[-1]
        size = num_in if self.kind == "int8" else BLOCK
        return F.pad(weight, (0, self._num_blocks * size - num_in)).unflatten(-1, (self._num_blocks, size))

    def forward(self, kept: Tensor) -> Tensor:
        return self.decode(kept, self.dtype)

    def decoder(self) -> Decode:
        return self.decode

    def decode(self, kept: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the values of rows of the parameter [..., in or bytes], in `dtype`."""
        if self.kind == "bf16":
            return kept.to(dtype)
        if self.kind == "int8":
            return (kept.float() * self.scale).to(dtype)
        num_in = self.shape[-1]
        if self.kind == "nf4":
            values = F.embedding(kept.int(), self.table[0]).flatten(-2)
        else:
            values = torch.stack([kept & 15, kept >> 4], -1).flatten(-2).float() - 8
        filling = self._num_blocks * BLOCK - values.shape[-1]
        whole = F.pad(values, (0, filling)) if filling else values
        scaled = whole.unflatten(-1, (self._num_blocks, BLOCK)) * self.scale.unsqueeze(-1)
        return scaled.flatten(-2)[..., :num_in].to(dtype)

    def extra_repr(self) -> str:
        return f"{list(self.shape)} as {self.kind}"


def coded_weights(model: nn.Module) -> Iterator[tuple[nn.Module, str, CodedWeight]]:
    """Yield (owner, key, what decodes it) of every parameter of `model` that holds codes."""
    for module in model.modules():
        if isinstance(module, Site):
            first = module.stage(Slot.COMPACT)
            if isinstance(first, CodedWeight) and first.has_codes:
                yield *module.weight_at, first


def bytes_decoded(site: Site) -> int:
    """Bytes that a use of the site's weight decodes it to; 0 where it is kept as it is, and for a table of rows."""
    first = site.stage(Slot.COMPACT)
    if not isinstance(first, CodedWeight) or not site.takes_inputs:
        return 0
    return first.shape.numel() * first.dtype.itemsize
