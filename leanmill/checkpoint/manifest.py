"""The manifest that makes a checkpoint folder count: names, sizes and checksums of all its files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from leanmill.core.errors import RunError


MANIFEST = "manifest.json"
FORMAT = "leanmill-checkpoint-1"
_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What a file must look like."""

    size: int
    """Bytes."""
    xxh3_128: str
    """Checksum, hexadecimal. It finds damage, not malice."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The last file written into a checkpoint."""

    step: int
    sequence: int
    """Counts the saves of a run folder; the newest has the highest, whatever its step (a run that
    went back to an earlier checkpoint writes lower steps later)."""
    score: float | None = None
    """Validation loss, lower is better."""
    partial: bool = False
    """Only some parameters of the model are in it (adapter runs)."""
    base: str | None = None
    """Fingerprint of the model that a partial checkpoint belongs to."""
    files: Mapping[str, FileRecord] = field(default_factory=dict)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write and flush the manifest; from here on the folder is complete."""
    content = {"format": FORMAT, **asdict(manifest)}
    write_json(folder / MANIFEST, {**content, "digest": _digest_json(content)})


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a complete checkpoint.

    Raises:
        RunError: There is none, or it is damaged; the message names the file.
    """
    path = folder / MANIFEST
    try:
        raw: dict[str, Any] = json.loads(path.read_bytes())
        digest = raw.pop("digest")
        if raw.pop("format") != FORMAT:
            raise RunError(f"{path}: written by another version of leanmill, whose format this one cannot read")
        if digest != _digest_json({"format": FORMAT, **raw}):
            raise ValueError("checksum differs")
        files = {name: FileRecord(**record) for name, record in raw.pop("files").items()}
        return Manifest(files=files, **raw)
    except FileNotFoundError as error:
        raise RunError(f"{path}: missing, so the checkpoint was never finished; use an earlier one") from error
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise RunError(f"{path}: damaged ({error}); use an earlier checkpoint") from error


def verify(path: str | Path, *, share: tuple[int, int] = (0, 1)) -> list[str]:
    """Compare a checkpoint's files with its manifest, sizes first, then checksums.

    Args:
        path: The checkpoint folder.
        share: (rank, world size): which share of the files to read for their checksums.

    Returns:
        One line a problem, each naming a file; empty when the checkpoint is sound.
    """
    folder = Path(path)
    try:
        manifest = read_manifest(folder)
    except RunError as error:
        return [str(error)]
    problems = []
    for name, record in manifest.files.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size is None:
            problems.append(f"{folder / name}: missing")
        elif size != record.size:
            problems.append(f"{folder / name}: {size} bytes where {record.size} were written")
    if problems:
        return problems
    rank, world_size = share
    for name in sorted(manifest.files)[rank::world_size]:
        try:
            if digest_file(folder / name) != manifest.files[name].xxh3_128:
                problems.append(f"{folder / name}: contents differ from what was written (checksum)")
        except OSError as error:
            problems.append(f"{folder / name}: unreadable ({error.strerror})")
    return problems


def complete_checkpoints(root: Path) -> list[tuple[Path, Manifest]]:
    """Return folders below `root` with a readable manifest, newest first; nothing else is read."""
    found = [(path, manifest) for path, manifest in _folders(root) if isinstance(manifest, Manifest)]
    return sorted(found, key=lambda item: item[1].sequence, reverse=True)


def unreadable_checkpoints(root: Path) -> list[tuple[Path, str]]:
    """Return folders below `root` whose manifest is missing or damaged, with the reason."""
    return [(path, str(error)) for path, error in _folders(root) if isinstance(error, RunError)]


def _folders(root: Path) -> Iterator[tuple[Path, Manifest | RunError]]:
    for folder in sorted(root.glob("step-*")) if root.is_dir() else ():
        if folder.suffix == "":  # not .tmp (being written) nor .old (being removed)
            try:
                yield folder, read_manifest(folder)
            except RunError as error:
                yield folder, error


def record_file(path: Path) -> FileRecord:
    """Describe a file that has just been written."""
    return FileRecord(size=path.stat().st_size, xxh3_128=digest_file(path))


def digest_file(path: Path) -> str:
    """Checksum of a file's bytes."""
    import xxhash

    state = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        block = memoryview(bytearray(_BLOCK_BYTES))
        while num_bytes := file.readinto(block):
            state.update(block[:num_bytes])
    return state.hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write JSON and flush it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to the disk (names of files, renames)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest_json(content: Mapping[str, Any] | Sequence[Any]) -> str:
    import xxhash

    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()
