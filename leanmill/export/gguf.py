"""Ternary models as a GGUF file for llama.cpp: blocks of 256 ternary weights with one fp16 scale each.

TQ1_0 takes 54 bytes a block (1.69 bits a weight), TQ2_0 66 (2.06). Codes are exact; scales are rounded to fp16. What
is not ternary is stored in fp32. Rows of queries and keys of llama models change their order, as llama.cpp has them.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from leanmill.core.errors import RunError
from leanmill.core.facets import Codes
from leanmill.export.compare import allowed, check_same, largest_difference, sample_logits
from leanmill.export.folded import FoldedFormat, prepare_config
from leanmill.export.formats import Checked
from leanmill.export.packed import packable_linears
from leanmill.export.packed_layers import packed_tensors
from leanmill.export.recode import recoded
from leanmill.models.pretrained import quiet_transformers


FILE = "model.gguf"
BLOCK = 256
"""Neighbours in a row that share a scale."""
_FAMILIES = ("llama", "qwen2", "qwen3")
"""Families whose GGUF form transformers reads back and whose names in it are those of llama.cpp."""


class GgufFormat(FoldedFormat):
    """A GGUF file whose ternary weights are TQ1_0."""

    label: ClassVar[str] = "gguf TQ1_0"
    packing: ClassVar[str] = "gguf"
    quantisation: ClassVar[str] = "TQ1_0"

    @classmethod
    @torch.no_grad()
    def covers(cls, model: Any) -> str | None:
        if importlib.util.find_spec("gguf") is None:
            return "the gguf package is not installed; type pip install 'leanmill[formats]', or use --packing ternary"
        config = model.config
        if config.model_type not in _FAMILIES:
            return f"GGUF is written for {', '.join(_FAMILIES)}, not {config.model_type}; use --packing ternary"
        if _rope(config).get("rope_type", "default") != "default" or getattr(config, "mlp_bias", False):
            return "scaled rotary positions and biases of mlps are not written to GGUF; use --packing ternary"
        if config.model_type == "llama" and config.attention_bias:
            return "biases of attention in llama models are not written to GGUF; use --packing ternary"
        found = False
        for name, codes in _ternary(model):
            found = True
            columns, groups = codes.values.shape[1], codes.scales.shape[-1]
            if columns // groups % BLOCK:
                in_groups = f" in {groups} groups" if groups > 1 else ""
                return (
                    f"{name} has {columns} columns{in_groups}, and GGUF's ternary types share a scale among {BLOCK}; "
                    f"exclude it from the technique, or use --packing ternary"
                )
            scales = codes.scales.float()
            if not torch.isfinite(scales.half()).all() or ((scales.half() == 0) & (scales != 0)).any():
                return (
                    f"{name} has scales from {scales.abs().min():.1e} to {scales.abs().max():.1e}, which fp16, as "
                    f"GGUF has them, does not hold; use --packing ternary"
                )
        return (
            None
            if found
            else (
                "no linear weight of this run is ternary (ternary, int_quant and symmetric lsq with 2 bits, paretoq "
                "with 1.58, and binary behind a mask make some); use --to hf, and llama.cpp's own quantiser"
            )
        )

    @torch.no_grad()
    def before_folding(self, model: Any) -> None:
        self.codes = dict(_ternary(model))

    @torch.no_grad()
    def write(self, folder: Path) -> None:
        prepare_config(self.model, self.rebuilt, folder)
        self.notes += _Writer(self.model, folder, self.codes, self.quantisation).write()
        with quiet_transformers():
            self.model.config.save_pretrained(folder)

    @torch.no_grad()
    def check(self, folder: Path) -> Checked:
        for name, codes in self.codes.items():
            self.model.get_submodule(name).weight.copy_(_rounded(codes))
        self._check_codes(folder)
        reference = sample_logits(self.model)
        reloaded = _reload(folder)
        difference = check_same(sample_logits(reloaded), reference, "the reloaded GGUF file")
        self.check_weights(reloaded, but=frozenset(f"{name}.weight" for name in self.codes))
        return Checked(
            max_difference=difference,
            tolerance=allowed(reference),
            num_parameters=self.num_parameters,
            sparsity=self.sparsity,
            compared="largest logit difference to the trained model with scales in fp16",
            notes=(
                *self.notes,
                *self.left_out,
                f"{len(self.codes)} linear weights as {self.quantisation}; the rounding of scales to fp16 moves the "
                f"largest logit by {largest_difference(reference, self.expected):.2e}",
            ),
        )

    def _check_codes(self, folder: Path) -> None:
        """Read every code back with the gguf package: bit for bit what was trained."""
        import gguf

        reader = gguf.GGUFReader(str(folder / FILE))
        stored = {tensor.name: tensor for tensor in reader.tensors}
        names = _names(self.model)
        for name, codes in self.codes.items():
            tensor = stored[names[f"{name}.weight"]]
            found = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
            expected = _arranged(self.model.config, name, _rounded(codes))
            if tensor.tensor_type.name != self.quantisation or not torch.equal(found, expected):
                raise RunError(f"{name} of the GGUF file is not the trained weight; nothing was written")


class Gguf2BitFormat(GgufFormat):
    """A GGUF file whose ternary weights are TQ2_0: larger than TQ1_0, and faster to multiply."""

    label: ClassVar[str] = "gguf TQ2_0"
    quantisation: ClassVar[str] = "TQ2_0"


class _Writer:
    """One file under way."""

    def __init__(self, model: Any, folder: Path, codes: Mapping[str, Codes], quantisation: str) -> None:
        import gguf

        self.gguf, self.model, self.folder, self.codes, self.quantisation = gguf, model, folder, codes, quantisation
        self.file = gguf.GGUFWriter(str(folder / FILE), model.config.model_type)

    def write(self) -> tuple[str, ...]:
        """Write everything; return notes for the report."""
        self._write_config()
        notes = self._write_tokenizer()
        self._write_tensors()
        self.file.write_header_to_file()
        self.file.write_kv_data_to_file()
        self.file.write_tensors_to_file()
        self.file.close()
        return notes

    def _write_config(self) -> None:
        config, file = self.model.config, self.file
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        file.add_name(config.model_type)
        file.add_vocab_size(config.vocab_size)
        file.add_context_length(config.max_position_embeddings)
        file.add_embedding_length(config.hidden_size)
        file.add_block_count(config.num_hidden_layers)
        file.add_feed_forward_length(config.intermediate_size)
        file.add_head_count(config.num_attention_heads)
        file.add_head_count_kv(config.num_key_value_heads)
        file.add_key_length(head_dim)
        file.add_value_length(head_dim)
        file.add_rope_dimension_count(head_dim)
        file.add_rope_freq_base(float(_rope(config)["rope_theta"]))
        file.add_layer_norm_rms_eps(config.rms_norm_eps)
        file.add_file_type(self.gguf.LlamaFileType[f"MOSTLY_{self.quantisation}"])

    def _write_tensors(self) -> None:
        names, config = _names(self.model), self.model.config
        kind = self.gguf.GGMLQuantizationType[self.quantisation]
        for name, parameter in self.model.named_parameters():
            layer = name.removesuffix(".weight")
            if layer in self.codes:
                weight = _arranged(config, layer, _rounded(self.codes[layer])).numpy()
                self.file.add_tensor(names[name], self.gguf.quants.quantize(weight, kind), raw_dtype=kind)
            else:
                self.file.add_tensor(names[name], _arranged(config, layer, parameter.detach().float()).numpy())

    def _write_tokenizer(self) -> tuple[str, ...]:
        path = self.folder / "tokenizer.json"
        stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        pre, model = stored.get("pre_tokenizer") or {}, stored.get("model") or {}
        if model.get("type") != "BPE" or pre.get("type") != "ByteLevel" or not pre.get("use_regex", True):
            return ("the file has no tokenizer, since this run's is no plain byte-level BPE",)
        kinds, file = self.gguf.TokenType, self.file
        added = {token["id"]: token for token in stored.get("added_tokens", ())}
        by_id = {index: text for text, index in model["vocab"].items()} | {i: t["content"] for i, t in added.items()}
        tokens, types = [], []
        for index in range(self.model.config.vocab_size):
            is_special = index in added and added[index]["special"]
            tokens.append(by_id.get(index, f"[PAD{index}]"))
            types.append(kinds.UNUSED if index not in by_id else kinds.CONTROL if is_special else kinds.NORMAL)
        file.add_tokenizer_model("gpt2")
        file.add_tokenizer_pre("gpt-2")
        file.add_token_list(tokens)
        file.add_token_types(types)
        file.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
        for key, add in (
            ("bos", file.add_bos_token_id),
            ("eos", file.add_eos_token_id),
            ("pad", file.add_pad_token_id),
        ):
            token = getattr(self.model.generation_config, f"{key}_token_id", None)
            if isinstance(token, int):
                add(token)
        return ()


def _ternary(model: nn.Module) -> Iterator[tuple[str, Codes]]:
    """Yield (name, ternary codes) of linear weights that share theirs with no table."""
    for name, _, codes in packable_linears(model):
        ternary = recoded(codes, "ternary") if isinstance(codes, Codes) else None
        if ternary is not None:
            yield name, ternary


def _rounded(codes: Codes) -> Tensor:
    """The weight [out, in], fp32, with its scales rounded to fp16."""
    scales = packed_tensors(codes)[1].half().float()
    return (codes.values.float().unflatten(-1, (scales.shape[-1], -1)) * scales.unsqueeze(-1)).flatten(-2)


def _arranged(config: Any, layer: str, weight: Tensor) -> Tensor:
    """Rows in the order that the file has them: llama's halves of a rotated head are interleaved."""
    leaf = layer.rpartition(".")[2]
    if config.model_type != "llama" or leaf not in ("q_proj", "k_proj"):
        return weight.contiguous()
    heads = config.num_attention_heads if leaf == "q_proj" else config.num_key_value_heads
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def _rope(config: Any) -> Mapping[str, Any]:
    return config.rope_parameters or {}


def _names(model: Any) -> dict[str, str]:
    """Return the name in the file of every parameter, tied ones once."""
    import gguf

    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == model.config.model_type)
    table = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    found = {}
    for name, _ in model.named_parameters():
        known = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise RunError(f"GGUF has no name for {name}; nothing was written. Use --packing ternary")
        found[name] = known
    return found


def _reload(folder: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet_transformers():
        # What transformers reads of the file's own settings leaves out the size of qwen3's heads.
        config = AutoConfig.from_pretrained(str(folder))
        return AutoModelForCausalLM.from_pretrained(
            str(folder), config=config, gguf_file=FILE, dtype=torch.float32
        ).eval()
