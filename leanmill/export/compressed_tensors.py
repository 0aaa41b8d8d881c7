"""Integer and small-float weights in the forms of compressed-tensors, which transformers and vLLM load.

A packed layer of integers has `<name>.weight_packed`, int32 [out, ceil(in bits / 32)] with the first code in the
lowest bits, `<name>.weight_scale`, [out, groups], and `<name>.weight_shape`, int64 [2]. Codes are 2, 4 or 8 bits around
a zero at the middle, c + 2^(bits - 1) for c from -2^(bits - 1) on; ternary codes take 2. Grids without a
zero (1 bit, midrise) have no such form, and neither have activations as they are rounded here: the library rounds a
token by max|x| / 127.5. Forms of floats are in `float_words`.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.errors import RunError
from leanmill.core.facets import Codes, FloatCodes
from leanmill.core.quiet import ignore_warning
from leanmill.core.transposed import NOT_LINEAR, transposed_weights
from leanmill.export.compare import allowed, check_same, largest_difference, reload, sample_logits
from leanmill.export.float_layers import form_of
from leanmill.export.float_words import FloatWords, covers_floats
from leanmill.export.folded import FoldedFormat, prepare_config
from leanmill.export.formats import Checked
from leanmill.export.packed import NOTHING_TO_PACK, packable_linears
from leanmill.export.packed_layers import packed_tensors
from leanmill.kernels.packing.op import pack
from leanmill.models.pretrained import quiet_transformers


_WORD_BYTES = 4
_BITS = (2, 4, 8)
_BF16_TWICE = 2.0**-7
"""Share that two roundings to bf16 may move a value by."""


class Words:
    """One weight as the format has it.

    Args:
        codes: Of a weight [out, in], which `words_of` found to fit.
        num_bits: 2, 4 or 8.
    """

    format = "pack-quantized"

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
        bits = ("num_bits", self.num_bits)
        return (("format", self.format), bits, ("type", "int"), ("strategy", strategy), ("group_size", size))

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


def why_not(name: str, codes: Codes | FloatCodes) -> str | None:
    """Return why the library has no form for the weight `name`, and what to type; None where it has one."""
    if isinstance(codes, FloatCodes):
        if covers_floats(codes):
            return None
        return (
            f"{name} is made of {form_of(codes)}, and compressed-tensors has mxfp4, mxfp6_e2m3, mxfp8_e4m3, nvfp4, and "
            f"e4m3 with a scale a row or weight; use --to packed, or train in one of those"
        )
    if bits_of(codes) is not None:
        return None
    return (
        f"{name} has {codes.encoding}-bit codes around {codes.zero:g}, and compressed-tensors has only grids with a "
        f"zero at the middle code; use --to packed, or train with a grid that has a zero"
    )


class CompressedTensorsFormat(FoldedFormat):
    """compressed-tensors' forms of linear weights: integers at 2, 4 or 8 bits, and floats of 4, 6 or 8."""

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
        if transposed_weights(model):
            return NOT_LINEAR
        found = False
        for name, _, codes in packable_linears(model):
            found = True
            reason = why_not(name, codes)
            if reason is not None:
                return reason
        return None if found else NOTHING_TO_PACK

    @torch.no_grad()
    def before_folding(self, model: Any) -> None:
        self.words: dict[str, Words | FloatWords] = {
            name: FloatWords(codes) if isinstance(codes, FloatCodes) else Words(codes, bits_of(codes) or 8)
            for name, _, codes in packable_linears(model)
        }

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
        if self._has_floats:
            # The library decodes floats to bf16, and does not say so to the rest.
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "bfloat16"}, indent=2) + "\n")

    def _configuration(self) -> dict[str, Any]:
        by_arguments: dict[tuple[tuple[str, Any], ...], list[str]] = {}
        for name, words in self.words.items():
            by_arguments.setdefault(words.arguments, []).append(name)
        plain = [name for name, m in self.model.named_modules() if isinstance(m, nn.Linear) and name not in self.words]
        groups, formats = {}, set()
        for index, (arguments, names) in enumerate(by_arguments.items()):
            settings = dict(arguments)
            formats.add(settings.pop("format"))
            groups[f"group_{index}"] = {
                "targets": ["Linear"] if len(by_arguments) == 1 else names,
                "weights": {**settings, "symmetric": True, "dynamic": False},
                "input_activations": None,
                "output_activations": None,
                "format": dict(arguments)["format"],
            }
        return {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": plain,
            "kv_cache_scheme": None,
        }

    @torch.no_grad()
    def check(self, folder: Path) -> Checked:
        self._check_codes(folder)
        reloaded = _decoded(folder) if self._has_floats else reload(folder)
        self._take_rounded(reloaded)
        expected = sample_logits(self.model)
        difference = check_same(sample_logits(reloaded), expected, "the reloaded compressed-tensors export")
        self.check_weights(reloaded, but=frozenset(f"{name}.weight" for name in self.words))
        forms = sorted({w.form if isinstance(w, FloatWords) else f"{w.num_bits} bits" for w in self.words.values()})
        return Checked(
            max_difference=difference,
            tolerance=allowed(expected),
            num_parameters=self.num_parameters,
            sparsity=self.sparsity,
            compared=(
                "largest logit difference to the trained model with what compressed-tensors decodes to bf16"
                if self._is_rounded
                else Checked.compared
            ),
            notes=(
                *self.notes,
                *self.left_out,
                f"{len(self.words)} linear weights packed to {' and '.join(forms)}; load it with transformers where "
                f"compressed-tensors is installed",
                *self._moved(expected),
            ),
        )

    @property
    def _has_floats(self) -> bool:
        return any(isinstance(words, FloatWords) for words in self.words.values())

    @property
    def _is_rounded(self) -> bool:
        return any(isinstance(words, FloatWords) and words.is_rounded for words in self.words.values())

    def _moved(self, expected: dict[str, Tensor]) -> tuple[str, ...]:
        if not self._is_rounded:
            return ()
        moved = largest_difference(expected, self.expected)
        return (f"compressed-tensors decodes nvfp4 in bf16, which moves the largest logit by {moved:.2e}",)

    def _take_rounded(self, reloaded: Any) -> None:
        """Look at what the library makes of floats, and give the trained model what it rounds in doing so."""
        for name, words in self.words.items():
            if not isinstance(words, FloatWords):
                continue
            found, weight = reloaded.get_submodule(name).weight, self.staged[f"{name}.weight"].float()
            allowed_ = weight.abs() * _BF16_TWICE if words.is_rounded else torch.zeros(())
            if not ((found - weight).abs() <= allowed_).all():
                raise RunError(
                    f"{name} of the compressed-tensors export is not the trained weight; nothing was written"
                )
            if words.is_rounded:
                self.model.get_submodule(name).weight.copy_(found)

    def _check_codes(self, folder: Path) -> None:
        """Read every integer back with the library: bit for bit what was trained."""
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        stored = _stored(folder)
        for name, words in self.words.items():
            if isinstance(words, FloatWords):
                continue
            found = unpack_from_int32(stored[f"{name}.weight_packed"], words.num_bits, words.shape)
            weight = self.staged[f"{name}.weight"].float()
            values = (found.float().unflatten(-1, (words.scales.shape[-1], -1)) * words.scales.unsqueeze(-1)).flatten(
                -2
            )
            if not (values - weight).abs().max() <= 1e-5 * weight.abs().max():
                raise RunError(
                    f"{name} of the compressed-tensors export is not the trained weight; nothing was written"
                )


def _decoded(folder: Path) -> Any:
    """Load it with every weight decoded, in fp32."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    ignore_warning("You passed `quantization_config` or equivalent", UserWarning)
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(
            str(folder), use_safetensors=True, dtype=torch.float32,
            quantization_config=CompressedTensorsConfig(dequantize=True),
        ).eval()  # fmt: skip


def _stored(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors
