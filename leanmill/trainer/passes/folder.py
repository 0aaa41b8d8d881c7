"""Model folders read and written a tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from leanmill.checkpoint.storage import write_tensors
from leanmill.core.errors import ConfigError, RunError


_INDEX = "model.safetensors.index.json"
_COPIED = ("*.json", "*.txt", "*.jinja", "*.model")


class SourceFolder:
    """The tensors of a Hugging Face folder, read when asked for.

    Args:
        path: Of the folder.
        transposed: Names of matrices that are read turned, [out, in] of what is stored [in, out].

    Raises:
        ConfigError: It holds no safetensors.
    """

    def __init__(self, path: Path, transposed: Set[str] = frozenset()) -> None:
        self.path, self.transposed = path, transposed
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise ConfigError(f"{path} holds no safetensors; give a model folder that transformers saved")
        self._file_of: dict[str, Path] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                self._file_of |= dict.fromkeys(opened.keys(), file)

    @property
    def keys(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._file_of)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the named tensors on the CPU, in memory of their own."""
        found = {}
        for name in names:
            with safe_open(self._file_of[name], framework="pt") as opened:
                tensor = opened.get_tensor(name)
                found[name] = tensor.t().contiguous() if name in self.transposed else tensor.clone()
        return found

    def dtypes(self, names: Iterable[str]) -> dict[str, torch.dtype]:
        """Return what the named tensors are stored in, without reading them."""
        found = {}
        for name in names:
            with safe_open(self._file_of[name], framework="pt") as opened:
                stored = opened.get_slice(name)
                found[name] = stored[tuple(slice(0, 0) for _ in stored.get_shape())].dtype
        return found


class TargetFolder:
    """A model folder in the making, one file for each call of `write`.

    Args:
        path: Of the folder.
        transposed: Names of matrices [out, in] that are stored [in, out].
    """

    def __init__(self, path: Path, transposed: Set[str] = frozenset()) -> None:
        self.path, self.transposed = path, transposed
        self._written: list[tuple[Path, list[str], int]] = []

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors as one more file."""
        if not tensors:
            return
        turned = self.transposed & tensors.keys()
        tensors = {**tensors, **{name: tensors[name].t().contiguous() for name in turned}}
        file = self.path / f"part-{len(self._written):05d}.safetensors"
        write_tensors(file, tensors)
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        self._written.append((file, list(tensors), num_bytes))

    def close(self, source: SourceFolder, config: Any = None) -> None:
        """Name the files as transformers does, write the index, copy configuration and tokenizer, look at it all.

        Args:
            source: Where the model came from.
            config: The transformers configuration of a model of another architecture; None is the source's, whose
                tensors the folder must have.

        Raises:
            RunError: Not every tensor was written.
        """
        index: dict[str, str] = {}
        for number, (file, names, _) in enumerate(self._written, 1):
            target = self.path / f"model-{number:05d}-of-{len(self._written):05d}.safetensors"
            file.rename(target)
            index |= dict.fromkeys(names, target.name)
        total = sum(num_bytes for *_, num_bytes in self._written)
        document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        (self.path / _INDEX).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        for pattern in _COPIED:
            for file in source.path.glob(pattern):
                if file.name != _INDEX:
                    shutil.copyfile(file, self.path / file.name)
        if config is not None:
            config.save_pretrained(self.path)
        self._check(source.keys if config is None else index.keys())

    def _check(self, wanted: Set[str]) -> None:
        written = SourceFolder(self.path)
        if written.keys != wanted:
            differing = sorted(wanted ^ written.keys)
            raise RunError(
                f"{self.path}: {len(differing)} tensors are missing or new ({differing[0]}); nothing was kept"
            )
