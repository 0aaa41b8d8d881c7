"""Storage for torch.distributed.checkpoint: one safetensors file a rank and an index in JSON.

Torch's own Hugging Face storage turns a rank's whole share into one byte string before it writes, and
gives no checksums. This one streams from the tensors' own memory and computes the checksum of what
it writes on the way. Its files keep that storage's header, so torch's `HuggingFaceStorageReader`
reads them too.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from leanmill.checkpoint.manifest import FileRecord, record_file, sync_folder, write_json
from leanmill.checkpoint.reading import INDEX, StoredChunk, open_tensors, read_index


_BLOCK_BYTES = 1 << 22  # small enough that hashing and writing find the block in the cache
_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Written:
    """What a rank tells the coordinator about one chunk."""

    chunk: StoredChunk
    dtype: torch.dtype
    shape: tuple[int, ...]
    record: FileRecord


class SafetensorsWriter(StorageWriter):
    """Write one part (model or optimizer) of a checkpoint.

    Args:
        folder: Folder of the part; created where missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, FileRecord] = {}
        """On the coordinator after `finish`: every file of the part."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between saves."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Create the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Keep the plan."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Number the ranks' files."""
        return [
            dataclasses.replace(plan, storage_data=f"{rank:05d}-of-{len(plans):05d}.safetensors")
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's chunks into one file."""
        future: Future[list[WriteResult]] = Future()
        future.set_result(self._write(plan, planner) if plan.items else [])
        return future

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        # safetensors wants data aligned to its dtype: widest first keeps every tensor so.
        items = sorted(plan.items, key=lambda item: (-_properties(item).dtype.itemsize, item.index.fqn))
        header, chunks = _header(items, plan.storage_data)
        record = _stream(self.folder / plan.storage_data, header, (planner.resolve_data(item) for item in items))
        return [
            WriteResult(
                item.index,
                math.prod(chunk.sizes) * _properties(item).dtype.itemsize,
                _Written(chunk, _properties(item).dtype, tuple(item.tensor_data.size), record),  # type: ignore[union-attr]
            )
            for item, chunk in zip(items, chunks, strict=True)
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, on the coordinator, once every rank has written.

        Raises:
            RuntimeError: The chunks of a tensor do not add up to it.
        """
        tensors: dict[str, dict[str, Any]] = {}
        for result in (r for rank in results for r in rank):
            written: _Written = result.storage_data
            entry = tensors.setdefault(
                result.index.fqn,
                {"dtype": str(written.dtype).removeprefix("torch."), "shape": written.shape, "chunks": []},
            )
            entry["chunks"].append(vars(written.chunk))  # hundreds of thousands of them on 1,024 ranks
            self.files[written.chunk.file] = written.record
        for name, entry in tensors.items():
            stored = sum(math.prod(chunk["sizes"]) for chunk in entry["chunks"])
            if stored != math.prod(entry["shape"]):
                raise RuntimeError(f"{name}: {stored} elements written of shape {list(entry['shape'])}")
        write_json(self.folder / INDEX, {"tensors": tensors}, compact=True)
        self.files[INDEX] = record_file(self.folder / INDEX)
        sync_folder(self.folder)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path will do."""
        return True


def _properties(item: WriteItem) -> TensorProperties:
    if item.tensor_data is None:
        raise TypeError(f"{item.index.fqn}: only tensors can be stored")
    return item.tensor_data.properties


def _header(items: list[WriteItem], file: str) -> tuple[bytes, list[StoredChunk]]:
    """Return the safetensors header for `items` in order, and where each will lie."""
    entries: dict[str, Any] = {}
    offsets_of: dict[str, dict[str, list[int]]] = {}
    chunks = []
    position = 0
    for item in items:
        properties, box = _properties(item), item.tensor_data.chunk  # type: ignore[union-attr]
        key = item.index.fqn if item.index.fqn not in entries else f"{item.index.fqn}@{list(box.offsets)}"
        end = position + math.prod(box.sizes) * properties.dtype.itemsize
        name = _DTYPE_NAMES[properties.dtype]
        entries[key] = {"dtype": name, "shape": list(box.sizes), "data_offsets": [position, end]}
        offsets_of[key] = {"saved_offsets": list(box.offsets)}
        chunks.append(StoredChunk(file, key, tuple(box.offsets), tuple(box.sizes)))
        position = end
    metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets_of)}
    return _encoded(metadata, entries), chunks


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write whole tensors as one safetensors file, from their own memory; safetensors' own function copies them all."""
    entries: dict[str, Any] = {}
    position = 0
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    for name, tensor in ordered:
        end = position + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end],
        }  # fmt: skip
        position = end
    return _stream(path, _encoded({"format": "pt"}, entries), (tensor for _, tensor in ordered))


def _encoded(metadata: dict[str, str], entries: dict[str, Any]) -> bytes:
    header = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _stream(path: Path, header: bytes, tensors: Any) -> FileRecord:
    """Write header and tensors, hashing on the way; the file is on the disk when this returns."""
    import xxhash

    digest, size = xxhash.xxh3_128(), 0
    with path.open("wb", buffering=0) as file:
        size += _write_all(file, memoryview(header), digest)
        for tensor in tensors:
            size += _write_all(file, _bytes_of(tensor), digest)
        os.fsync(file.fileno())
    return FileRecord(size=size, xxh3_128=digest.hexdigest())


def _write_all(file: Any, data: memoryview, digest: Any) -> int:
    for start in range(0, len(data), _BLOCK_BYTES):
        block = data[start : start + _BLOCK_BYTES]
        digest.update(block)
        while len(block):
            block = block[file.write(block) :]
    return len(data)


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    data: memoryview = flat.view(torch.uint8).numpy().data
    return data


class SafetensorsReader(StorageReader):
    """Read one part of a checkpoint into tensors of any sharding.

    Args:
        folder: Folder of the part.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between loads."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Turn the index into torch's terms."""
        tensors: dict[str, Any] = {}
        places: dict[MetadataIndex, StoredChunk] = {}
        for name, stored in read_index(self.folder).items():
            tensors[name] = TensorStorageMetadata(
                TensorProperties(dtype=stored.dtype),
                torch.Size(stored.shape),
                [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in stored.chunks],
            )
            places |= {MetadataIndex(name, chunk.offsets): chunk for chunk in stored.chunks}
        return Metadata(state_dict_metadata=tensors, storage_data=places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Remember where chunks lie."""
        self.places: dict[MetadataIndex, StoredChunk] = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Keep the plan."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Keep the plans."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the boxes this rank needs into its tensors."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.places[item.storage_index].file, []).append(item)
        for file, items in by_file.items():
            with open_tensors(self.folder / file) as tensors:
                for item in items:
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(_read_box(tensors, self.places[item.storage_index].key, item))
                    planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path will do."""
        return True


def _read_box(tensors: Any, key: str, item: ReadItem) -> Tensor:
    if not item.lengths:
        return tensors.get_tensor(key)  # type: ignore[no-any-return]
    box = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
    return tensors.get_slice(key)[box]  # type: ignore[no-any-return]
