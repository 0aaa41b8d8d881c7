"""Reading tensors of a checkpoint: an index in JSON, bytes in safetensors, nothing unpickled."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

import torch
from torch import Tensor

from leanmill.checkpoint.manifest import confined, read_manifest
from leanmill.core.errors import RunError


INDEX = "index.json"
Part = Literal["model", "optimizer", "outer", "workers"]
_PARTS: tuple[Part, ...] = ("model", "optimizer", "outer", "workers")


@dataclass(frozen=True)
class StoredChunk:
    """A box of a tensor and where it lies."""

    file: str
    """Name of the safetensors file in the part's folder."""
    key: str
    """Name of the box in that file."""
    offsets: tuple[int, ...]
    """First element of the box in the whole tensor, one a dim."""
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor made of boxes that cover it exactly."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]


def read_index(folder: Path) -> dict[str, StoredTensor]:
    """Read which tensors a part's folder holds.

    Raises:
        RunError: The index is missing or damaged, or names a file outside the checkpoint.
    """
    path = folder / INDEX
    try:
        raw: dict[str, Any] = json.loads(_inside(folder, INDEX).read_bytes())["tensors"]
        index = {name: _parse(entry) for name, entry in raw.items()}
        files = {chunk.file for stored in index.values() for chunk in stored.chunks}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{path}: missing or damaged ({error}); use an earlier checkpoint") from error
    for file in files:
        _inside(folder, file)
    return index


def parts_of(path: Path) -> list[Part]:
    """Return the parts that a checkpoint has; the last two only where workers wrote it."""
    return [part for part in _PARTS if (path / part).is_dir()]


def optimized_names(path: Path) -> set[str]:
    """Return the names of the parameters whose optimizer state a checkpoint holds."""
    return {name.rpartition("/")[0] for name in read_index(path / "optimizer")}


def read_document(folder: Path, name: str) -> dict[str, Any]:
    """Read one of a checkpoint's JSON documents, such as `train_state.json`.

    Raises:
        RunError: It is missing, damaged, or leads out of the checkpoint.
    """
    path = confined(folder, name)
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: missing or damaged; use another checkpoint") from error
    if not isinstance(value, dict):
        raise RunError(f"{path}: damaged, it holds no mapping; use another checkpoint")
    return value


def _inside(folder: Path, file: str) -> Path:
    """Return a file of a part's folder; the part itself may not lead out of the checkpoint either."""
    if PurePath(file).name != file:
        raise RunError(f"{folder / INDEX}: damaged, {file!r} is no name of a file beside it; use an earlier checkpoint")
    return confined(folder.parent, f"{folder.name}/{file}")


def _parse(entry: dict[str, Any]) -> StoredTensor:
    chunks = [StoredChunk(str(c["file"]), c["key"], tuple(c["offsets"]), tuple(c["sizes"])) for c in entry["chunks"]]
    dtype = getattr(torch, entry["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown dtype {entry['dtype']!r}")
    return StoredTensor(dtype, tuple(entry["shape"]), tuple(chunks))


def read_full_state(path: str | Path, part: Part = "model") -> dict[str, Tensor]:
    """Read every tensor of a checkpoint, whole and on the CPU, in one process without a group.

    Args:
        path: The checkpoint folder.
        part: `model`, or `optimizer` whose names are `"<parameter>/<state key>"`. A partial
            checkpoint (see `Manifest.partial`) holds the trained parameters only. What workers add is in `workers.py`.

    Raises:
        RunError: The folder is no finished checkpoint, or damaged.
    """
    read_manifest(Path(path))
    folder = Path(path) / part
    index = read_index(folder)
    state = {name: torch.empty(stored.shape, dtype=stored.dtype) for name, stored in index.items()}
    by_file: dict[str, list[tuple[str, StoredChunk]]] = {}
    for name, stored in index.items():
        for chunk in stored.chunks:
            by_file.setdefault(chunk.file, []).append((name, chunk))
    for file, chunks in by_file.items():
        with open_tensors(folder / file) as tensors:
            for name, chunk in chunks:
                box = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
                state[name][box] = tensors.get_tensor(chunk.key)
    return state


def open_tensors(path: Path) -> Any:
    """Open a safetensors file lazily.

    Raises:
        RunError: It is missing or its header is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")  # type: ignore[no-untyped-call]
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: missing or damaged ({error}); use an earlier checkpoint") from error
