"""A folder of a model whose layers are stored in forms of their own, and back.

It has the config and tokenizer of any Hugging Face folder, but its tensors are in `packed.safetensors`, so that
nobody takes it for a model that transformers loads. `packed.json` says for each layer of another form its kind and
what its tensors do not say. A head that is the table of inputs is stored once, under the table's name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leanmill.checkpoint.storage import write_tensors
from leanmill.core.errors import ConfigError, RunError
from leanmill.export.float_layers import FloatEmbedding, FloatLinear
from leanmill.export.packed_layers import PackedEmbedding, PackedLinear
from leanmill.export.sparse_layer import SparseLinear
from leanmill.export.stored_layer import StoredLayer
from leanmill.models.pretrained import quiet_transformers


TENSORS, LAYERS = "packed.safetensors", "packed.json"
KINDS: dict[str, type[StoredLayer]] = {
    kind.kind: kind for kind in (PackedLinear, PackedEmbedding, FloatLinear, FloatEmbedding, SparseLinear)
}


def save(model: Any, layers: Mapping[str, StoredLayer], shared: Mapping[str, str], folder: Path) -> None:
    """Save a folded model, some layers of it in forms of their own.

    Args:
        model: A plain model.
        layers: What takes the place of its layers, by name.
        shared: Of those, the ones that have the tensors of another, and its name.
        folder: Is there.
    """
    with quiet_transformers():
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
    state = {name: tensor for name, tensor in _own(model) if name.removesuffix(".weight") not in layers}
    entries: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        entries[name] = {"kind": layer.kind, **layer.settings()}
        if name in shared:
            entries[name]["shares"] = shared[name]
        else:
            state |= {f"{name}.{key}": getattr(layer, key) for key in layer.stored}
    write_tensors(folder / TENSORS, {name: tensor.contiguous() for name, tensor in state.items()})
    (folder / LAYERS).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def _own(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers, tied ones once."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor.detach()


def load(folder: str | Path) -> Any:
    """Load a folder of `save`: a causal LM in eval mode on the CPU, fp32 but for what is stored otherwise.

    Raises:
        ConfigError: The folder holds no such model.
        RunError: Its tensors are not those of its config.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    import leanmill.models.own_families  # noqa: F401

    folder = Path(folder)
    if not (folder / LAYERS).is_file():
        raise ConfigError(
            f"{folder} holds no {LAYERS}; give a folder that `leanmill export --to packed`, or --to hf --packing int4 "
            f"and the like, wrote"
        )
    entries = json.loads((folder / LAYERS).read_text(encoding="utf-8"))
    state = load_file(folder / TENSORS)
    with quiet_transformers(), no_init_weights():  # all of them come from the file
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    shared = {name for name, entry in entries.items() if "shares" in entry}
    if shared:
        model.config.tie_word_embeddings = False  # a packed table has no parameter that could be tied
        model.all_tied_weights_keys = {}
    for name, entry in entries.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _layer(folder, name, entry, state))
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if not shared:
        model.tie_weights()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    absent = [name for name in missing if name not in tied and name.rpartition(".")[0] not in shared]
    if unexpected or absent:
        raise RunError(f"{folder}: {[*unexpected, *absent][0]} is in one of {TENSORS} and config.json only")
    return model.eval()


def _layer(folder: Path, name: str, entry: Mapping[str, Any], state: Mapping[str, Tensor]) -> StoredLayer:
    kind = entry.get("kind", "linear")  # folders of before there were kinds
    source = entry.get("shares", name)
    if kind not in KINDS:
        raise RunError(f"{folder}: {name} is of the kind {kind!r}, which this version does not know; update leanmill")
    tensors = {key: state.get(f"{source}.{key}") for key in KINDS[kind].stored}
    absent = [key for key, tensor in tensors.items() if tensor is None]
    if absent:
        raise RunError(f"{folder}: {source}.{absent[0]} is in {LAYERS} and not in {TENSORS}; export it again")
    settings = {key: value for key, value in entry.items() if key not in ("kind", "shares")}
    present = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    return KINDS[kind].restored(present, state.get(f"{name}.bias"), settings)
