"""The weights of a Hugging Face folder, read one at a time, in whole or in part: nobody holds them all.

How names in a folder become names in a module is transformers' own table of renamings and conversions. Read
here is what is stored under one name, and experts that are stored one by one and stacked in the module;
where a family needs another conversion, nothing here is used (`FolderWeights.open` returns None).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanmill.core.errors import ConfigError
from leanmill.core.technique import ModelTask
from leanmill.core.transposed import as_linears, transposed_weights
from leanmill.models.config import ModelConfig
from leanmill.models.pretrained import incomplete, weights_folder
from leanmill.models.tasks import auto_class, options_of


@dataclass(frozen=True)
class Source:
    """Where one tensor of a module lies."""

    shape: tuple[int, ...]
    keys: tuple[str, ...]
    """Names in the folder: one; or, stacked, of each expert's parts in order, expert by expert."""
    num_parts: int = 0
    """Of an expert, one below the other: gate and up, or down alone; 0 for a tensor that is stored as it is."""
    is_transposed: bool = False
    """Whether the folder has it [in, out]."""


class FolderWeights:
    """Reads weights by their names in the plain model.

    Args:
        folder: With safetensors files.
        files: Name of the file of every key.
        sources: By name in the plain model.
    """

    def __init__(self, folder: Path, files: Mapping[str, str], sources: Mapping[str, Source]) -> None:
        self.folder, self.files, self.sources = folder, files, sources

    @classmethod
    def open(cls, config: ModelConfig, *, downloads: bool) -> FolderWeights | None:
        """Return a reader of `config.path`; None where it takes transformers' own loader.

        Args:
            config: With a `path`.
            downloads: Whether a model of the hub may be fetched, or must be here already.

        Raises:
            ConfigError: It is no model folder, or lacks experts.
            RunError: The hub cannot be reached.
        """
        if config.trust_remote_code:
            return None
        found = weights_folder(config, downloads=downloads)
        if found is None:
            return None
        folder, hf_config = found
        files = _files(folder)
        sources = None if files is None else _sources(str(config.path), hf_config, list(files), config.task)
        if files is None or sources is None:
            return None
        weights = cls(folder, files, sources)
        try:
            return weights if weights._has_shapes() else None
        except Exception:
            return None  # transformers' loader says what is wrong with the files

    @property
    def identity(self) -> list[Any]:
        """What is equal on all ranks that see the same folder."""
        return [sorted(self.files.items()), sorted((name, source.shape) for name, source in self.sources.items())]

    @torch.no_grad()
    def read_into(self, out: Tensor, name: str, offsets: Sequence[int] | None = None) -> None:
        """Write a box of a weight into `out`, which tells its size; without offsets the whole.

        Files are mapped into memory and copied from, a tensor, or a part of an expert, at a time: no more of the
        weight than `out` is held.

        Args:
            out: Of any dtype and device.
            name: In the plain model.
            offsets: Where in the weight the box begins.
        """
        if out.numel() == 0:
            return
        source = self.sources[name]
        box = [slice(start, start + size) for start, size in zip(offsets or [0] * out.dim(), out.shape, strict=True)]
        # What has been touched of a file counts as long as it is open.
        with ExitStack() as stack:
            files: dict[str, Any] = {}
            if not source.num_parts:
                stored = self._file(source.keys[0], files, stack).get_slice(source.keys[0])
                if source.is_transposed:
                    out.copy_(stored[box[1], box[0]].t())
                else:
                    out.copy_(stored[tuple(box)] if box else stored[...])
                return
            for row, expert in zip(out, range(box[0].start, box[0].stop), strict=True):
                first = expert * source.num_parts
                keys = source.keys[first : first + source.num_parts]
                _stack([self._file(key, files, stack).get_slice(key) for key in keys], row, box[1], box[2])

    def _file(self, key: str, files: dict[str, Any], stack: ExitStack) -> Any:
        from safetensors import safe_open

        name = self.files[key]
        if name not in files:
            files[name] = stack.enter_context(safe_open(self.folder / name, framework="pt", device="cpu"))
        return files[name]

    def _has_shapes(self) -> bool:
        """Whether what is stored has the shapes that the model's config describes."""
        with ExitStack() as stack:
            files: dict[str, Any] = {}
            for source in self.sources.values():
                shapes = [self._file(key, files, stack).get_slice(key).get_shape() for key in source.keys]
                if not source.num_parts:
                    is_alike = shapes[0] == list(source.shape[::-1] if source.is_transposed else source.shape)
                else:
                    one = shapes[: source.num_parts]
                    is_alike = shapes == one * source.shape[0] and all(len(shape) == 2 for shape in one)
                    is_alike = is_alike and [sum(shape[0] for shape in one), one[0][1]] == list(source.shape[1:])
                if not is_alike:
                    return False
        return True


def _stack(parts: Sequence[Any], out: Tensor, rows: slice, columns: slice) -> None:
    """Write a box of an expert's parts, one below the other, into `out`."""
    begin = done = 0
    for part in parts:
        height = part.get_shape()[0]
        first, last = max(rows.start - begin, 0), min(rows.stop - begin, height)
        if first < last:
            out[done : done + last - first].copy_(part[first:last, columns])
            done += last - first
        begin += height


def _files(folder: Path) -> dict[str, str] | None:
    """Name of the file of every key; None where the folder has none of the names that transformers writes."""
    from safetensors import safe_open

    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    try:
        if single.is_file():
            with safe_open(single, framework="pt", device="cpu") as opened:
                return dict.fromkeys(opened.keys(), single.name)
        if index.is_file():
            files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return files if all((folder / name).is_file() for name in set(files.values())) else None
    except Exception:
        return None  # transformers' loader says what is wrong with them
    return None


def _sources(path: str, hf_config: Any, keys: list[str], task: ModelTask) -> dict[str, Source] | None:
    """Find where each tensor of the plain model lies; None where that takes more than is read here."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError:  # another version of transformers
        return None
    with torch.device("meta"):
        model = as_linears(auto_class(task).from_config(hf_config, **options_of(hf_config, task)))
    state: dict[str, Tensor] = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    if len(renamings) + len(converters) < len(transforms):
        return None
    found: dict[str, dict[str, list[str]]] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, pattern = key, None
        found.setdefault(name, {}).setdefault(pattern or "", []).append(key)
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    sources: dict[str, Source] = {}
    turned = transposed_weights(model)
    for name, tensor in state.items():
        source = _source(path, found.get(name, {}), tuple(tensor.shape), by_pattern)
        if source is not None:
            sources[name] = replace(source, is_transposed=name in turned)
    for name, other in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        for one, twin in ((name, other), (other, name)):
            if one in state and one not in sources and twin in sources:
                sources[one] = sources[twin]
    return sources if sources.keys() == state.keys() else None


def _source(
    path: str, found: Mapping[str, list[str]], shape: tuple[int, ...], converters: Mapping[str, Any]
) -> Source | None:
    if len(found) == 1 and len(found.get("", ())) == 1:
        return Source(shape, tuple(found[""]))
    if not found or "" in found:
        return None
    converter = converters[next(iter(found))]
    if not _stacks_experts(converter) or not found.keys() <= set(converter.source_patterns) or len(shape) != 3:
        return None
    numbered = [_by_expert(found.get(pattern, []), pattern) for pattern in converter.source_patterns]
    _check_complete(path, numbered, converter.source_patterns, shape[0])
    keys = [part[expert] for expert in range(shape[0]) for part in numbered]
    return Source(shape, tuple(keys), len(numbered))


def _stacks_experts(converter: Any) -> bool:
    """Whether it stacks the experts of each part and puts the parts below each other, and does no more."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    steps = [(type(step), step.dim) for step in converter.operations]
    stack, below = (MergeModulelist, 0), (Concatenate, 1)
    return steps == [stack, below] or (steps == [stack] and len(converter.source_patterns) == 1)


def _by_expert(keys: Sequence[str], pattern: str) -> dict[int, str]:
    before, _, after = pattern.partition("*")
    number = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
    matches = {key: number.search(key) or re.search(r"\.experts\.(\d+)\.", key) for key in keys}
    return {int(match.group(1)): key for key, match in matches.items() if match is not None}


def _check_complete(path: str, numbered: list[dict[int, str]], patterns: Sequence[str], num_experts: int) -> None:
    missing: list[str] = []
    for part, pattern in zip(numbered, patterns, strict=True):
        for expert in sorted(set(range(num_experts)) - part.keys()):
            like = next(iter(part.values()), pattern)
            missing.append(re.sub(r"\.experts\.(\d+|\*)\.", f".experts.{expert}.", like))
    if missing:
        raise ConfigError(incomplete(path, missing))
    extra = sorted({expert for part in numbered for expert in part if expert >= num_experts})
    if extra:
        raise ConfigError(
            f"{path} holds experts up to number {extra[-1]}, and its config describes {num_experts} in a layer; give a "
            f"matching config.json"
        )
