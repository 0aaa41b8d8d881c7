"""Frozen weights in fewer bytes: in bf16, or as codes of 8 to 2 bits with a scale for each block of a row.

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

from leanmill.core.normal_float import nearest_codes, normal_float_levels
from leanmill.core.site import Site
from leanmill.core.stage import Decode, Slot, Stage
from leanmill.kernels.packing.op import pack, unpack


Kind = Literal["bf16", "int8", "int4", "int2", "nf4", "nf3", "nf2"]
BLOCK = 64
"""Neighbours of a row that share a scale in 2 to 4 bits, as in QLoRA; with 8 bits a whole row does."""


class CodedWeight(Stage):
    """Decodes a frozen weight that a site keeps in fewer bytes; the first stage of all.

    Args:
        shape: Of the weight, [..., out, in].
        dtype: Of the decoded weight.
    """

    slot: ClassVar[Slot] = Slot.COMPACT
    scale: nn.Parameter
    """fp32 or bf16 [..., out, blocks], where the parameter holds codes."""

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
    - `int2`: codes -1 .. 1, offset by 1, four in a byte, alike; scales in bf16, as those of `nf3` and `nf2` are.
    - `nf4`, `nf2`: indices of `normal_float_levels`, stored alike. Unlike QLoRA's their scales are not quantised in
      turn, and a block never spans two rows, so that any rank can encode and decode its own rows.
    - `nf3`: the same; the lower two bits of all codes of a row, four in a byte, then the third bits, eight in a byte.

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
            empty = torch.empty(*shape[:-1], self._num_blocks, dtype=self._scale_dtype, device=device)
            self.scale = nn.Parameter(empty, requires_grad=False)
        if self.is_normal_float:
            shape_of_table = (1, 8, 1) if kind == "nf3" else (1, 256, 8 // self.num_bits)
            self.register_buffer("table", torch.empty(shape_of_table, device=device), persistent=False)
            self.reset_parameters()

    @property
    def has_codes(self) -> bool:
        return self.kind != "bf16"

    @property
    def is_normal_float(self) -> bool:
        """Whether codes are indices of levels rather than multiples of a scale."""
        return self.kind.startswith("nf")

    @property
    def num_bits(self) -> int:
        """Of a weight, without scales."""
        return 16 if self.kind == "bf16" else int(self.kind[-1])

    @property
    def bits_a_weight(self) -> float:
        """Bits of a weight on average, with scales."""
        num_bytes = self.empty(torch.device("meta")).nbytes + (self.scale.nbytes if self.has_codes else 0)
        return 8 * num_bytes / self.shape.numel()

    @property
    def _scale_dtype(self) -> torch.dtype:
        # A quarter of a bit, where a half would be a quarter of all.
        return torch.bfloat16 if self.kind in ("int2", "nf3", "nf2") else torch.float32

    @property
    def _num_blocks(self) -> int:
        return 1 if self.kind == "int8" else math.ceil(self.shape[-1] / BLOCK)

    def empty(self, device: torch.device) -> Tensor:
        if self.kind in ("bf16", "int8"):
            dtype = torch.bfloat16 if self.kind == "bf16" else torch.int8
            return torch.empty(self.shape, dtype=dtype, device=device)
        return torch.empty(*self.shape[:-1], self._num_bytes, dtype=torch.uint8, device=device)

    @property
    def _num_bytes(self) -> int:
        """Of a row, with 4 bits or fewer."""
        num_in = self.shape[-1]
        if self.kind == "nf3":
            return math.ceil(num_in / 4) + math.ceil(num_in / 8)
        return math.ceil(num_in * self.num_bits / 8)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if not self.is_normal_float:
            return
        levels = torch.tensor(normal_float_levels(self.num_bits))
        if self.kind == "nf3":
            self.table.copy_(levels.view(1, 8, 1))
            return
        # All values of a byte at once: fewer look-ups, and indices of fewer bytes.
        byte = torch.arange(256)
        shifts = range(0, 8, self.num_bits)
        values = [levels[byte >> shift & 2**self.num_bits - 1] for shift in shifts]
        self.table.copy_(torch.stack(values, -1).unsqueeze(0))

    @torch.no_grad()
    def encode(self, weight: Tensor, rounds_to: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """See `CodedWeight.encode`.

        Args:
            weight: [..., in], floating.
            rounds_to: What the largest magnitude of a block is rounded to. Where the decoded weight is then stored in
                that dtype, encoding it again gives the same codes and scales.
        """
        *rows, num_in = weight.shape
        blocks = self._blocks(weight.float())
        largest = blocks.abs().amax(-1).to(rounds_to).to(self._scale_dtype).float()
        relative = blocks / largest.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
        if self.is_normal_float:
            codes = nearest_codes(relative, self.num_bits).view(*rows, -1)[..., :num_in]
            return self._pack(codes.to(torch.uint8).contiguous()), largest.to(self._scale_dtype)
        top = 2 ** (self.num_bits - 1) - 1
        codes = (relative * top).round().view(*rows, -1)[..., :num_in]
        if self.kind == "int8":
            return codes.to(torch.int8), largest / top
        return self._pack((codes + self._offset).to(torch.uint8).contiguous()), (largest / top).to(self._scale_dtype)

    @property
    def _offset(self) -> int:
        """Added to integers, so that none is negative: 8 with 4 bits, 1 with 2."""
        return 8 if self.kind == "int4" else 1

    def _pack(self, codes: Tensor) -> Tensor:
        if self.kind == "nf3":
            return torch.cat([pack(codes & 3, 2), pack(codes >> 2, 1)], -1)
        return pack(codes, self.num_bits)  # type: ignore[arg-type]

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
        if self.kind == "nf3":
            values = F.embedding(self._unpack_three(kept).int(), self.table[0]).flatten(-2)
        elif self.is_normal_float:
            values = F.embedding(kept.int(), self.table[0]).flatten(-2)
        else:
            shifts, mask = range(0, 8, self.num_bits), 2**self.num_bits - 1
            values = torch.stack([kept >> shift & mask for shift in shifts], -1).flatten(-2).float() - self._offset
        filling = self._num_blocks * BLOCK - values.shape[-1]
        whole = F.pad(values, (0, filling)) if filling else values
        scaled = whole.unflatten(-1, (self._num_blocks, BLOCK)) * self.scale.unsqueeze(-1)
        return scaled.flatten(-2)[..., :num_in].to(dtype)

    def _unpack_three(self, kept: Tensor) -> Tensor:
        """Codes of 3 bits [..., in], uint8."""
        num_in = self.shape[-1]
        lower, upper = kept.split([math.ceil(num_in / 4), math.ceil(num_in / 8)], -1)
        return unpack(lower.contiguous(), 2, num_in) | unpack(upper.contiguous(), 1, num_in) << 2

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
