"""Public entry: `HeldRows`, a packed weight that is multiplied again and again."""

from __future__ import annotations

import torch
from torch import Tensor

from leanmill.kernels.packed_matmul import cpu, one_token
from leanmill.kernels.packed_matmul.op import MIDDLE, packed_matmul, per_row
from leanmill.kernels.packing.encoding import TERNARY, Encoding, number_of, packed_length


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class HeldRows:
    """W[o, i] = (code[o, i] - zero) * scale[o, g], checked once; for evaluation, not differentiable.

    What `packed_matmul` computes, but that one token on the CPU goes to C at once: for one token the dispatch of
    an operator and its checks take as long as a product.

    Args:
        packed: uint8 [out, bytes], what `packing.pack` returns.
        scales: fp32 [out, groups].
        encoding: What `packing.pack` was given.
        num_codes: in.
        zero: The code that stands for zero; None is the middle. Ternary codes take None.
        int8_activations: See `packed_matmul`.

    Raises:
        ValueError: Shapes that do not fit, a `zero` of ternary codes, or int8 activations otherwise than
            `packed_matmul` takes them.
    """

    def __init__(
        self, packed: Tensor, scales: Tensor, encoding: Encoding, num_codes: int, *,
        zero: float | None = None, int8_activations: bool = False,
    ) -> None:  # fmt: skip
        number = number_of(encoding)
        if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != packed_length(num_codes, number):
            raise ValueError(
                f"packed {packed.dtype} {tuple(packed.shape)} is no weight that has {num_codes} codes a row; it must "
                f"be uint8 [out, {packed_length(num_codes, number)}]"
            )
        if number == TERNARY and zero is not None:
            raise ValueError(f"zero is {zero!r} with encoding 'ternary', whose codes are -1, 0 and 1; leave it None")
        self._row_scales = per_row(scales, packed, num_codes, "scales").float().contiguous()
        if int8_activations and (number != TERNARY or self._row_scales.shape[1] != 1):
            raise ValueError(
                f"int8_activations with encoding {encoding!r} and scales {tuple(scales.shape)}; allowed: 'ternary' and "
                f"[out, 1] or one element"
            )
        self.packed, self.scales, self.encoding = packed, scales, encoding
        self.num_codes, self.int8_activations = num_codes, int8_activations
        self.zero = MIDDLE[number] if zero is None else float(zero)
        self._rows = self._in_c(number)

    def _in_c(self, number: int) -> one_token.RowsInC | None:
        packed, scales = self.packed.contiguous(), self._row_scales
        if packed.device.type != "cpu" or not packed.numel():
            return None
        if not one_token.covers(number, self.num_codes, scales.shape[1]):
            return None
        zeros = torch.full_like(scales, self.zero + (number == TERNARY))
        return one_token.RowsInC(packed, scales, zeros, self.num_codes, number)

    def multiply(self, x: Tensor) -> Tensor:
        """Return x @ W^T [..., out] in the dtype of `x`, for floating [..., in]."""
        if self._rows is not None and self._is_one_plain_token(x):
            out = self._one(x.detach().float().contiguous())
            if out is not None:
                return out.to(x.dtype).view(*x.shape[:-1], out.shape[0])
        zero = None if self.encoding == "ternary" else self.zero
        return packed_matmul(
            x, self.packed, self.scales, self.encoding, zero_points=zero, int8_activations=self.int8_activations
        )

    def _is_one_plain_token(self, x: Tensor) -> bool:
        return (
            type(x) is Tensor
            and not torch.compiler.is_compiling()
            and x.numel() == self.num_codes == x.shape[-1]
            and x.device.type == "cpu"
            and x.dtype in _DTYPES
        )

    def _one(self, x: Tensor) -> Tensor | None:
        assert self._rows is not None
        if not self.int8_activations:
            return self._rows.multiply(x)
        codes, token_scale = cpu.quantise_tokens(x.view(1, -1))
        return self._rows.count(codes) * (token_scale * self._row_scales[:, 0]).view(-1)
