"""Integer weights in the `pack-quantized` form of compressed-tensors, which transformers and vLLM load.

A packed layer has `<name>.weight_packed`, int32 [out, ceil(in bits / 32)] with the first code in the lowest
bits, `<name>.weight_scale`, [out, groups], and `<name>.weight_shape`, int64 [2]. Codes are 2, 4 or 8 bits around
a zero at the middle, c + 2^(bits - 1) for c from -2^(bits - 1) on; ternary codes take 2. Grids without a
zero (1 bit, midrise) have no such form, and neither have activations as they are rounded here: the library rounds a
token by max|x| / 127.5.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.errors import RunError
from leanmill.core.facets import Codes
from leanmill.export.compare import allowed, check_same, reload, sample_logits
from leanmill.export.folded import FoldedFormat, prepare_config
from leanmill.export.formats import Checked
from leanmill.export.packed import NOTHING_TO_PACK, packable_linears
from leanmill.export.packed_layers import packed_tensors
from leanmill.kernels.packing.op import pack
from leanmill.models.pretrained import quiet_transformers


_WORD_BYTES = 4
_BITS = (2, 4, 8)


class Words:
    """One weight as the format has it.

    Args:
        codes: Of a weight [out, in], which `words_of` found to fit.
        num_bits: 2, 4 or 8.
    """

    def __init__(self, codes: Codes, num_bits: int) -> None:
        self.num_bits = num_bits
        self.shape = torch.tensor(codes.values.shape)
        moved = codes.values.to(torch.int16) - int(codes.zero) + (1 << (num_bits - 1))
        packed = pack(moved.to(torch.uint8), num_bits)  # type: ignore[arg-type]
        self.packed = F.pad(packed, (0, -packed.shape[-1] % _WORD_BYTES)).contiguous().view(torch.int32)
        self.scales = packed_tensors(codes)[1]

    @property
    def arguments(self) -> tuple[tuple[str, Any], ...]:
        """What the format's configuration says of the weight."""
        groups = self.scales.shape[-1]
        strategy = "channel" if groups == 1 else "group"
        size = None if groups == 1 else int(self.shape[-1]) // groups
        return (("num_bits", self.num_bits), ("strategy", strategy), ("group_size", size))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the stored tensors of the layer `name`."""
        return {
            f"{name}.weight_packed": self.packed,
            f"{name}.weight_scale": self.scales,
            f"{name}.weight_shape": self.shape,
        }


def bits_of(codes: Codes) -> int | None:
    """Return the least bits that hold these codes around the middle; None where the grid has no zero."""
    zero = int(codes.zero)
    if zero != codes.zero:
        return None
    signed = codes.values.to(torch.int16) - zero
    low, high = (int(signed.min()), int(signed.max())) if signed.numel() else (0, 0)
    first = 2 if codes.encoding == "ternary" else int(codes.encoding)
    return next(
        (bits for bits in _BITS if bits >= first and -(1 << (bits - 1)) <= low and high < 1 << (bits - 1)), None
    )


class CompressedTensorsFormat(FoldedFormat):
    """compressed-tensors' `pack-quantized`: integer linear weights at 2, 4 or 8 bits."""

    label: ClassVar[str] = "compressed-tensors"
    packing: ClassVar[str] = "compressed_tensors"

    @classmethod
    @torch.no_grad()
    def covers(cls, model: Any) -> str | None:
        if importlib.util.find_spec("compressed_tensors") is None:
            return (
                "compressed-tensors is not installed, and an export counts only once it was loaded back; type pip "
                "install 'leanmill[formats]', or use --packing int4"
            )
        found = False
        for name, _, codes in packable_linears(model):
            found = True
            if bits_of(codes) is None:
                return (
                    f"{name} has {codes.encoding}-bit codes around {codes.zero:g}, and compressed-tensors has only "
                    f"grids with a zero at the middle code; use --to packed, or train with a grid that has a zero"
                )
        return None if found else NOTHING_TO_PACK

    @torch.no_grad()
    def before_folding(self, model: Any) -> None:
        self.words = {name: Words(codes, bits_of(codes) or 8) for name, _, codes in packable_linears(model)}

    def write(self, folder: Path) -> None:
        prepare_config(self.model, self.rebuilt, folder)
        state = {
            name: value for name, value in self.model.state_dict().items() if name[: -len(".weight")] not in self.words
        }
        for name, words in self.words.items():
            state |= words.tensors(name)
        self.model.config.quantization_config = self._configuration()
        try:
            with quiet_transformers():
                self.model.save_pretrained(folder, state_dict=state, safe_serialization=True)
        finally:
            del self.model.config.quantization_config

    def _configuration(self) -> dict[str, Any]:
        by_arguments: dict[tuple[tuple[str, Any], ...], list[str]] = {}
        for name, words in self.words.items():
            by_arguments.setdefault(words.arguments, []).append(name)
        plain = [name for name, m in self.model.named_modules() if isinstance(m, nn.Linear) and name not in self.words]
        groups = {
            f"group_{index}": {
                "targets": ["Linear"] if len(by_arguments) == 1 else names,
                "weights": {**dict(arguments), "type": "int", "symmetric": True, "dynamic": False},
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
            for index, (arguments, names) in enumerate(by_arguments.items())
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": plain,
            "kv_cache_scheme": None,
        }

    def check(self, folder: Path) -> Checked:
        self._check_codes(folder)
        reloaded = reload(folder)
        difference = check_same(sample_logits(reloaded), self.expected, "the reloaded compressed-tensors export")
        self.check_weights(reloaded, but=frozenset(f"{name}.weight" for name in self.words))
        bits = sorted({words.num_bits for words in self.words.values()})
        return Checked(
            max_difference=difference,
            tolerance=allowed(self.expected),
            num_parameters=self.num_parameters,
            sparsity=self.sparsity,
            notes=(
                *self.notes,
                *self.left_out,
                f"{len(self.words)} linear weights packed to {' and '.join(map(str, bits))} bits; load it with "
                f"transformers where compressed-tensors is installed",
            ),
        )

    def _check_codes(self, folder: Path) -> None:
        """Read every code back with the library: bit for bit what was trained."""
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        stored = _stored(folder)
        for name, words in self.words.items():
            found = unpack_from_int32(stored[f"{name}.weight_packed"], words.num_bits, words.shape)
            weight = self.staged[f"{name}.weight"].float()
            values = (found.float().unflatten(-1, (words.scales.shape[-1], -1)) * words.scales.unsqueeze(-1)).flatten(
                -2
            )
            if not (values - weight).abs().max() <= 1e-5 * weight.abs().max():
                raise RunError(
                    f"{name} of the compressed-tensors export is not the trained weight; nothing was written"
                )


def _stored(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors
