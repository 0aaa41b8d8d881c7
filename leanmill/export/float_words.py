"""Small floats in the forms of compressed-tensors: MXFP4, MXFP6, MXFP8, NVFP4, and E4M3 with plain scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanmill.core.facets import FloatCodes
from leanmill.export.float_layers import form_of, stored_tensors


_FORMS = {
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp6_e2m3": "mxfp6-pack-quantized",
    "mxfp8_e4m3": "mxfp8-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "e4m3": "float-quantized",
}
"""What the library calls a format."""


class FloatWords:
    """One weight as the library has it.

    The library decodes to bf16, which holds elements times powers of two exactly, and rounds with `nvfp4`; plain E4M3
    is decoded in the dtype of its scales.

    Args:
        codes: Of a weight [out, in], which `covers_floats` found to fit.
    """

    def __init__(self, codes: FloatCodes) -> None:
        self.form, self.num_bits = form_of(codes), codes.num_bits
        self.format = _FORMS[self.form]
        self.packed, self.scales = stored_tensors(codes)
        self.outer = codes.outer
        self.group_size = codes.values.shape[-1] // codes.scales.shape[-1]
        self.has_groups = self.form != "e4m3"

    @property
    def is_rounded(self) -> bool:
        """Whether the library's decoding rounds."""
        return self.form == "nvfp4"

    @property
    def arguments(self) -> tuple[tuple[str, Any], ...]:
        """What the format's configuration says of the weight."""
        strategy = "tensor_group" if self.form == "nvfp4" else "group" if self.has_groups else "channel"
        scale_dtype = {"nvfp4": "torch.float8_e4m3fn", "e4m3": None}.get(self.form, "torch.uint8")
        return (
            ("format", self.format),
            ("num_bits", self.num_bits),
            ("type", "float"),
            ("strategy", strategy),
            ("group_size", self.group_size if self.has_groups else None),
            ("scale_dtype", scale_dtype),
        )

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the stored tensors of the layer `name`."""
        if self.num_bits == 8:
            return {f"{name}.weight": self.packed.view(torch.float8_e4m3fn), f"{name}.weight_scale": self.scales}
        stored = {f"{name}.weight_packed": self.packed, f"{name}.weight_scale": self.scales}
        if self.outer is not None:
            # The library divides by the one and multiplies by the other.
            stored[f"{name}.weight_scale"] = self.scales.view(torch.float8_e4m3fn)
            stored[f"{name}.weight_global_scale"] = self.outer.reciprocal().reshape(1)
        return stored


def covers_floats(codes: FloatCodes) -> bool:
    """Whether the library has a form for these."""
    form = form_of(codes)
    has_row_scales = codes.scales.dtype == torch.float32 and codes.scales.shape[-1] == 1
    return form in _FORMS and (form != "e4m3" or has_row_scales)
